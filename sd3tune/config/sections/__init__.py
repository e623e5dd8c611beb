"""The sections of the configuration; sections that change together share a file."""
