"""Base models: their files, configurations and locations. Only `tiny` and `folder` import torch."""
