"""From an image request to pictures: conditions, text encoders, transformer, VAE; grids, prompt files and replays."""
