"""The world of `nano`: captioned pictures that are drawn here, and what reads them back."""
