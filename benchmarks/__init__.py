"""Side-by-side measurements; `python -m benchmarks.run`, or `make bench`, runs them."""
