"""Experiment trackers: curves, pictures and configuration of a run; their errors never stop a run."""
