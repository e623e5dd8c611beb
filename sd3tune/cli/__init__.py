"""Argument parsing only; each command is imported when it runs."""
