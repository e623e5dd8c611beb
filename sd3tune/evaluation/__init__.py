"""Measurement of a run, an adapter or a folder of pictures: draw, measure, compare, and name the best."""
