"""Quick starts: importing torch and diffusers makes a million objects that the garbage collector need not look at.

peft imports bitsandbytes wherever it is installed, and that most of torch's compiler: a second and 60 MB that few runs
need. The rest of the compiler, which diffusers imports, takes Triton along: 70 MB.
"""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

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
def quick_imports(doing: str, compiles: bool = False) -> Iterator[None]:
    """Around the first import of a job: no collections in between, and none later that look at what was imported.

    Importing takes seconds, so `doing`, such as `train rex.yaml`, is said first, on standard error.

    That is over a second of a start, and nearly half a second of each later collection, of which encoding makes
    one after each component that it frees. Does nothing in a process that has imported it all before.
    `compiles`: torch's compiler will be used, parts of which look for Triton once, as they are imported.
    """
    if "diffusers" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        with (
            loading(f"{doing}: loading PyTorch and diffusers"),
            _without_bitsandbytes(),
            nullcontext() if compiles else _without_triton(),
        ):
            yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or extension modules complain of leaks at the end


@contextmanager
def _without_bitsandbytes() -> Iterator[None]:
    """While the libraries are imported. peft remembers that until a model is quantised (see `model.quantized`)."""
    with _absent("bitsandbytes"):
        yield
        if "peft" in sys.modules:
            from peft.import_utils import is_bnb_available

            is_bnb_available()


@contextmanager
def _without_triton() -> Iterator[None]:
    """While the libraries are imported; but for torch, which registers kernels by whether Triton is there."""
    import torch  # noqa: F401
    from torch.utils._triton import has_triton_package

    flop_counter = logging.getLogger("torch.utils.flop_counter")
    level = flop_counter.level
    flop_counter.setLevel(logging.ERROR)  # it warns that it cannot count the operations of Triton's kernels
    try:
        with _absent("triton"):
            yield
    finally:
        flop_counter.setLevel(level)
        has_triton_package.cache_clear()


@contextmanager
def _absent(name: str) -> Iterator[None]:
    """The library counts as not installed; what asks for it afterwards finds it."""
    if name in sys.modules:
        yield
        return
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
