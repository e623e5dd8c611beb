"""Efficient computation of a step: the fast path, adaLN computed ahead, gradient checkpointing."""
