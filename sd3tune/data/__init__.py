"""Images and captions as a user keeps them, the order they are seen in, and the store of their encodings."""
