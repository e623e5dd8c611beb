"""Callbacks of the training loop: previews, validation, trackers and uploads. They change nothing of the run."""
