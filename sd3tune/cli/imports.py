"""Quick starts: importing torch and diffusers makes a million objects that the garbage collector need not look at.

peft imports bitsandbytes wherever it is installed, and that most of torch's compiler: a second and 60 MB that few runs
need. The rest of the compiler, which diffusers imports, takes Triton along: 70 MB.
"""

from __future__ import annotations

import atexit
import gc
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_LATER = ("bitsandbytes", "triton")


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
        with _absent(_LATER):
            yield
    finally:
        gc.freeze()
        gc.enable()
        atexit.register(gc.unfreeze)  # or extension modules complain of leaks at the end


@contextmanager
def _absent(names: Sequence[str]) -> Iterator[None]:
    """They count as not installed while the libraries are imported; what asks for them afterwards finds them.

    But for peft, which remembers the answer about bitsandbytes until a model is quantised (see `model.quantized`).
    """
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    flop_counter = logging.getLogger("torch.utils.flop_counter")
    level = flop_counter.level
    flop_counter.setLevel(logging.ERROR)  # it warns that it cannot count the kernels of Triton
    try:
        yield
        if "peft" in sys.modules:
            from peft.import_utils import is_bnb_available

            is_bnb_available()
    finally:
        flop_counter.setLevel(level)
        for name in hidden:
            del sys.modules[name]
    if "torch" in sys.modules:
        from torch.utils._triton import has_triton_package

        has_triton_package.cache_clear()
