"""What a base model is and where its files are. Only `tiny` and `folder` import torch."""
