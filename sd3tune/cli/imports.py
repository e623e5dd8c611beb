"""Quick starts: importing torch and diffusers makes a million objects that the garbage collector need not look at.

peft imports bitsandbytes wherever it is installed, and that torch's compiler: a second and 60 MB that few runs need.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_BITSANDBYTES = "bitsandbytes"


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
        with _bitsandbytes_later():
            yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or extension modules complain of leaks at the end


@contextmanager
def _bitsandbytes_later() -> Iterator[None]:
    """bitsandbytes counts as not installed while the libraries are imported; what asks for it afterwards finds it.

    But for peft, which remembers the answer, until a model is quantised (see `model.quantized`).
    """
    if _BITSANDBYTES in sys.modules:
        yield
        return
    sys.modules[_BITSANDBYTES] = None  # type: ignore[assignment]
    try:
        yield
        if "peft" in sys.modules:
            from peft.import_utils import is_bnb_available

            is_bnb_available()
    finally:
        del sys.modules[_BITSANDBYTES]
