"""Quick starts, for a process that is the command line's own; a program that imports sd3tune is left as it is.

Importing torch and diffusers makes a million objects that the garbage collector need not look at. peft imports
bitsandbytes wherever it is installed, and few runs need it: 0.65 of 3.75 s on one core, and 50 MB.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from sd3tune.reporting import loading

SPINS = "10000"
"""A thirtieth of GNU OpenMP's own 300000, which takes milliseconds. Far fewer slow a small model on idle cores."""


def spin_briefly() -> None:
    """Let threads of GNU OpenMP that wait for others sleep soon, unless the environment says how they wait.

    On idle cores the wait is mostly over sooner. On busy cores a thread that spins takes the core from the one that it
    waits for. The library reads the environment when torch loads it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


@contextmanager
def quick_imports(doing: str) -> Iterator[None]:
    """Collect no garbage during the first import of a command, and never look at what was imported later.

    That saves over a second of a start, and nearly half a second of each later collection, of which encoding makes
    one after each component that it frees. It does nothing in a process that has imported everything before.
    Importing takes seconds, so the command, `doing`, such as `train rex.yaml`, is named first, on standard error.
    """
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        with loading(f"{doing}: loading PyTorch and diffusers"), _without_bitsandbytes():
            yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or extension modules complain of leaks at the end


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes count as not installed while the libraries are imported; whoever asks later finds it.

    peft remembers its answer until a model is quantised (see `model.load.quantized`).
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        yield
        if "peft" in sys.modules:
            from peft.import_utils import is_bnb_available

            is_bnb_available()
    finally:
        del sys.modules["bitsandbytes"]
