"""Images and captions of a user, the order of training samples, and the store of encodings."""
