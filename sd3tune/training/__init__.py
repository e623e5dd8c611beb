"""Training: `step.py` is one step, `loop.py` repeats it; the rest serves those two."""
