"""What is shared: the model card."""
