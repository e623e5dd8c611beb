"""What is shared: the model card, and the upload to the Hub."""
