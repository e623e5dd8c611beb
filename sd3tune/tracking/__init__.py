"""Curves, pictures and the configuration of a run in experiment trackers; no run depends on one."""
