"""What pictures are measured by: encoders, similarities, distances between sets, intervals and a verdict."""
