"""Faster start of the command line. Programs that import sd3tune are not affected.

Importing torch and diffusers makes a million objects that garbage collection can skip. peft imports bitsandbytes
wherever it is installed, although few runs need it: 0.65 of 3.75 s on one core, and 50 MB.
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
"""A thirtieth of GNU OpenMP's default, 300000, which takes milliseconds. Far fewer slow a small model on idle cores."""


def spin_briefly() -> None:
    """Shorten the spinning of waiting GNU OpenMP threads, unless the environment already configures it.

    On idle cores most waits end before the limit. On busy cores a spinning thread blocks the core of the thread that
    it waits for. Call this before torch is imported, which loads the library and reads the environment.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = SPINS


@contextmanager
def quick_imports(activity: str) -> Iterator[None]:
    """Disable garbage collection while a command is first imported, and exclude the imported objects from later ones.

    This saves over a second per start, and nearly half a second per later collection; encoding collects after each
    component that it frees. It has no effect in a process that has already imported diffusers. Importing takes
    seconds, so `activity`, such as `train rex.yaml`, is first printed to standard error.
    """
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        with loading(f"{activity}: loading PyTorch and diffusers"), _without_bitsandbytes():
            yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # otherwise extension modules report leaks at exit


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """Hide bitsandbytes while the libraries are imported; later imports find it.

    peft caches that it is missing until a model is quantised (see `model.load.quantized`).
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
