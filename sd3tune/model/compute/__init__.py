"""How a training step is computed: the fast path, adaLN ahead of time, gradient checkpointing."""
