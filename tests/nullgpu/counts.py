"""Count the calls of a piece of code to the null GPU, in the process that runs it.

with counting() as seen:
    step()
seen.steady()                      # raises, naming the lines, if the host waited or copied pageable memory
seen.launches, seen.kernels        # their number, and by name
fact("launches", seen.launches)    # for the test that started this process: `ran.facts["launches"]`
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

FACTS = "NULLGPU_FACTS"
"""Environment variable: the file for facts, one JSON object per line."""
_ROOT = Path(__file__).parents[2]
_HERE = str(Path(__file__).parent)


class _Counters(ctypes.Structure):
    """`struct counters` of nullgpu.h."""

    _fields_ = [
        (name, ctypes.c_long)
        for name in (
            *("launches", "products", "memsets", "syncs", "event_waits", "to_device", "to_device_bytes"),
            *("to_host", "to_host_bytes", "pageable", "pageable_bytes", "on_device", "collectives"),
        )
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")  # loaded already


def _counters() -> dict[str, int]:
    all_ = _Counters.in_dll(_library(), "nullgpu_counters")
    return {name: getattr(all_, name) for name, _ in _Counters._fields_}


def _kernels() -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    name, launches = ctypes.c_char_p(), ctypes.c_long()
    place = 0
    while _library().nullgpu_kernel(place, ctypes.byref(name), ctypes.byref(launches)):
        if launches.value:
            found[_readable(name.value or b"")] += launches.value
        place += 1
    return found


def _readable(mangled: bytes) -> str:
    """Return the name of a C++ symbol."""
    cxx = ctypes.CDLL("libstdc++.so.6")
    cxx.__cxa_demangle.restype = ctypes.c_char_p
    return (cxx.__cxa_demangle(mangled, None, None, None) or mangled).decode()


@dataclass
class Seen:
    """Counts of a piece of code; those of nullgpu.h, and more."""

    counts: dict[str, int] = field(default_factory=dict)
    waits: collections.Counter[str] = field(default_factory=collections.Counter)
    """Host waits and pageable copies: how often each happened, by kind and line."""
    kernels: collections.Counter[str] = field(default_factory=collections.Counter)
    """Launches by the kernel's name. Triton's and cuBLAS's kernels are not among them."""
    host_ms: float = 0.0
    """CPU time of the process."""

    def __getattr__(self, name: str) -> int:
        try:
            return self.__dict__["counts"][name]
        except KeyError:
            raise AttributeError(name) from None

    def steady(self) -> None:
        """Raise AssertionError, which names the lines, for host waits or pageable copies."""
        if self.waits:
            raise AssertionError("; ".join(f"{times} x {what}" for what, times in self.waits.most_common()))


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_CALLBACKS: list[Any] = []
"""All that were ever set: another thread may still be about to call one."""


@contextlib.contextmanager
def counting() -> Iterator[Seen]:
    """Count what the body does. Not to be nested."""
    seen = Seen()

    def on_wait(what: bytes) -> None:
        seen.waits[f"{what.decode()} at {_line()}"] += 1

    callback = _CALLBACK(on_wait)
    _CALLBACKS.append(callback)
    where = ctypes.c_void_p.in_dll(_library(), "nullgpu_on_wait")
    _library().nullgpu_reset_counters()
    _library().nullgpu_reset_kernels()
    where.value = ctypes.cast(callback, ctypes.c_void_p).value
    started = time.process_time()
    try:
        yield seen
    finally:
        seen.host_ms = 1000 * (time.process_time() - started)
        where.value = None
        seen.counts, seen.kernels = _counters(), _kernels()


def _line() -> str:
    """Return the line of this project that led here, and the innermost line of all if it is another.

    In a thread of the backward pass without Python code, these are the main thread's.
    """
    frames = _frames(sys._getframe(2))
    if not frames:
        main = sys._current_frames().get(threading.main_thread().ident or 0)
        frames = _frames(main)
    if not frames:
        return "an unknown line"
    own = [frame for frame in frames if frame.startswith(("sd3tune", "benchmarks"))]
    return own[0] if own and own[0] == frames[0] else f"{own[0]} ({frames[0]})" if own else frames[0]


def _frames(frame: FrameType | None) -> list[str]:
    """Return the lines from the innermost on, without torch's own and this module's."""
    found = []
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(_HERE) and "/site-packages/torch/" not in file and not file.startswith("<frozen"):
            path = Path(file)
            shown = path.relative_to(_ROOT) if path.is_relative_to(_ROOT) else Path(*path.parts[-3:])
            found.append(f"{shown}:{frame.f_lineno}")
        frame = frame.f_back
    return found


def fact(name: str, value: Any) -> None:
    """Tell the test that started this process; a later fact of the same name replaces an earlier one."""
    with Path(os.environ[FACTS]).open("a", encoding="utf-8") as file:
        file.write(json.dumps({name: value}) + "\n")
