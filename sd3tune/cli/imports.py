"""Quick starts: importing torch and diffusers makes a million objects that the garbage collector need not look at."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Around the first import of a job: no collections in between, and none later that look at what was imported.

    That is over a second of a start, and nearly half a second of each later collection, of which encoding makes
    one after each component that it frees. Does nothing in a process that has imported it all before.
    """
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or extension modules complain of leaks at the end
