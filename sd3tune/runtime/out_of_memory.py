"""Out-of-memory errors, explained with the activity and the next setting to change."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from sd3tune.errors import RunError


@contextlib.contextmanager
def explain_oom(activity: str, hint: Callable[[], str]) -> Iterator[None]:
    """Raise RunError in place of an out-of-memory error in the body; `hint()` returns the advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise RunError(f"out of memory while {activity}: {hint()}") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means out of memory: torch has a class for GPUs, but only a message for the CPU."""
    message = str(error)
    on_the_cpu = "can't allocate memory" in message or "Cannot allocate memory" in message
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (isinstance(error, RuntimeError) and on_the_cpu)
