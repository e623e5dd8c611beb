"""Captions and masks of photos, made with pretrained models."""
