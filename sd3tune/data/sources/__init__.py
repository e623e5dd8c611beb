"""Sources of training images, one file per kind."""
