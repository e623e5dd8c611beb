"""What no call may do, whatever it is given: hang, fill the memory, print controls, or reach what is not its own.

The bounds of time and memory are those of a machine that is busy with other things.
"""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd3tune.reporting import escaped

SECONDS = 60
"""After which a call hangs."""
RESIDENT, MAPPED = 4 * 2**30, 12 * 2**30
"""Bytes of memory that a call may take, and of address space, beyond which allocations fail."""
OUTSIDE = "outside"
"""A folder beside a door's own, and part of the names of files in it; no call opens what is in there."""
_FOREIGN = ("/etc/passwd", "/etc/hostname", "/dev/zero", "/proc/self/environ")
"""Files of every machine that examples may name, and that no call opens."""
_CHANGES: dict[str, tuple[tuple[int, int | None], ...]] = {
    "os.remove": ((0, 1),),
    "os.rename": ((0, 2), (1, 3)),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
    "os.truncate": ((0, None),),
    "os.chmod": ((0, 2),),
    "os.chown": ((0, 3),),
    "os.utime": ((0, 3),),
}
"""Audit event -> which of its arguments are paths that change, and which the folders they are relative to."""
_NETWORK = ("socket.connect", "socket.getaddrinfo")
_CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@contextlib.contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Raise AssertionError for a call that leaves its bounds; `folder` is where it may write."""
    before = _peak()
    with _alarm(), _limited(), _printing_plainly(), _touching_only(folder):
        yield
    grown = _peak() - before
    assert grown < RESIDENT, f"a call takes {grown:,} bytes of memory"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Hang(BaseException):
    """A call that does not end. No handler of errors in the call takes it for one of its own, nor is it shrunk."""


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang(f"a call takes longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Let allocations fail that would take a machine's memory. Linux alone says how much is mapped."""
    mapped = Path("/proc/self/statm")
    if not mapped.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(mapped.read_text().split()[0]) * resource.getpagesize()
    limits = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([now + MAPPED, *limits]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _printing_plainly() -> Iterator[None]:
    """Raise when what was printed, by Python or by a library of C, holds control characters or a traceback."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with _instead("stdout", out), _instead("stderr", err):
            yield
        for file, of_bars in ((out, ""), (err, "\r")):
            file.seek(0)
            said = file.read().decode()
            assert "Traceback" not in said, said
            for line in said.replace(of_bars, "").split("\n") if of_bars else said.split("\n"):
                assert escaped(line) == line, ascii(line)


@contextlib.contextmanager
def _instead(name: str, file: Any) -> Iterator[None]:
    """Write to `file` what goes to `sys.stdout` or `sys.stderr`, and to the descriptor below it."""
    descriptor = {"stdout": 1, "stderr": 2}[name]
    stream = getattr(sys, name)
    stream.flush()
    kept = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    text = io.TextIOWrapper(io.FileIO(file.fileno(), "w", closefd=False), "utf-8", write_through=True)
    setattr(sys, name, text)
    try:
        yield
    finally:
        text.flush()
        setattr(sys, name, stream)
        os.dup2(kept, descriptor)
        os.close(kept)


class _Watch:
    """Sees which files Python opens and changes while a door is tried; hooks of `sys` are for ever."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.faults: list[str] = []

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event == "open":
            self._see(event, arguments[0], bool(arguments[2] & _CHANGING))
        if event in _NETWORK:
            self.faults.append(f"{event} {arguments[1:]}")
        for path, start in _CHANGES.get(event, ()):
            self._see(event, arguments[path], True, -1 if start is None else arguments[start])

    def _see(self, event: str, path: Any, changes: bool, start: int = -1) -> None:
        if isinstance(path, int):  # a file that is open already
            return
        named = os.fsdecode(path)
        full = named if start == -1 else os.path.join(os.readlink(f"/proc/self/fd/{start}"), named)
        if not self._may(full, changes):
            self.faults.append(f"{event} of {full}")

    def _may(self, path: str, changes: bool) -> bool:
        real = os.path.realpath(path)
        if not changes:
            return real not in _FOREIGN and os.path.join(os.path.dirname(self.folder or ""), OUTSIDE) not in real
        return "__pycache__" in real or any(real.startswith(one) for one in (self.folder or "", *_caches()))


_WATCH = _Watch()
sys.addaudithook(_WATCH.hook)


def _caches() -> list[str]:
    caches = (os.environ.get("SD3TUNE_CACHE"), os.environ.get("HF_DATASETS_CACHE"))
    return [os.path.realpath(one) for one in caches if one] + ["/dev/"]


@contextlib.contextmanager
def _touching_only(folder: Path) -> Iterator[None]:
    """Raise when the call opens what is not its own, or changes what is elsewhere."""
    _WATCH.folder, _WATCH.faults = os.path.realpath(folder), []
    try:
        yield
    finally:
        _WATCH.folder = None
        assert not _WATCH.faults, _WATCH.faults
