"""Argument parsing and nothing else; the jobs are imported when a command runs."""
