"""The sections of the configuration, one file for those that change together."""
