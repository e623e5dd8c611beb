"""Measures of pictures: encoders, similarities, distances between sets, intervals and a verdict."""
