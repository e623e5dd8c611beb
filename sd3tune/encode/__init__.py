"""Encode captions and images into the store, with one text encoder or the VAE in memory at a time."""
