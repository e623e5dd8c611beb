"""Captions and images into the store, one component in memory at a time, and never the transformer."""
