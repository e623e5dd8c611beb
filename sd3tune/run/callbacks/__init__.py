"""Callbacks of the training loop: previews, validation, trackers and uploads. They do not affect training."""
