"""The world of `nano`: captioned pictures, drawn by rules, and an oracle that reads them."""
