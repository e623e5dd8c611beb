"""Loading the parts of a base model, and running its text encoders and VAE."""
