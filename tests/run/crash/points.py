"""The moments at which a run could die: before and after every change that it makes to a file or a folder."""

from __future__ import annotations

import builtins
import functools
import hashlib
import io
import itertools
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


Death = tuple[int, bool]
"""The number of a point, and whether what is not synced there is torn."""


@dataclass(frozen=True)
class Point:
    when: str
    """`before` or `after`."""
    operation: str
    name: str
    """The path in the workspace, without what differs from run to run."""
    left: str = ""
    """A digest of what a death here leaves."""
    torn: str = ""
    """The same with writes torn; empty where all that was written is durable."""

    @property
    def kind(self) -> tuple[str, str]:
        """The operation, and the sort of file or folder; whatever lies in a model's folder is of one sort."""
        *above, name = Path(self.name).parts
        if any(re.fullmatch(r"(\.tmp-.*)?model(_raw)?", folder) for folder in above):
            name = "in a model"
        return self.operation, re.sub(r"\d{4,}|^\.tmp-(old-|removed-)?", "N", name)


class Watch:
    """Calls `reached` at every point below `folder`, in the process that makes it.

    `before` comes from the interpreter's audit events, which no call evades, and `after` from wrapped functions; that
    the two agree is checked by the test that lists the points. The events know neither fsync nor the file that
    safetensors writes without Python, so both come from wrapped functions.
    """

    def __init__(self, folder: Path, reached: Callable[[Point], object]) -> None:
        self.folder, self.reached = os.path.realpath(folder), reached
        self._durable = {os.stat(path).st_ino: os.stat(path).st_size for path in self._files()}
        self._busy = False
        self._open: list[tuple[str, str]] = []
        for module, name in [*((os, name) for name in _CALLS), (builtins, "open"), (io, "open")]:
            setattr(module, name, self._with_after(getattr(module, name)))
        for name in ("mkdir", "rename", "replace", "rmdir", "unlink", "open"):  # Python 3.10 binds them there
            if hasattr(accessor := getattr(pathlib, "_NormalAccessor", None), name):
                setattr(accessor, name, staticmethod(getattr(io if name == "open" else os, name)))
        os.fsync = self._fsync(os.fsync)
        safetensors.torch.serialize_file = self._serialize_file(safetensors.torch.serialize_file)
        sys.addaudithook(self._audit)

    def tear(self, copy: Path) -> None:
        """Leave in a copy half of what was written since the last fsync of each file, as a write cut off would."""
        for path in self._files():
            size, durable = os.stat(path).st_size, self._durable.get(os.stat(path).st_ino, 0)
            if size > durable:
                os.truncate(copy / os.path.relpath(path, self.folder), durable + (size - durable) // 2)

    def _files(self) -> list[str]:
        return [os.path.join(root, name) for root, _, names in os.walk(self.folder) for name in names]

    def left(self) -> tuple[str, str]:
        """Digests of what is there now, and of what `tear` would make of it, "" where there is nothing to tear."""
        folders = sorted(root for root, _, _ in os.walk(self.folder))
        files = [(path, os.stat(path)) for path in self._files()]
        there = sorted((path, status.st_size, status.st_mtime_ns) for path, status in files)
        durable = sorted((path, min(self._durable.get(status.st_ino, 0), status.st_size)) for path, status in files)
        is_durable = [size for _, size in durable] == [size for _, size, _ in there]
        return _digest(folders, there), "" if is_durable else _digest(folders, there, durable)

    def _at(self, when: str, operation: str, path: str) -> None:
        self._busy = True
        name = re.sub(r"\.tmp-[0-9a-f]+-", ".tmp-", os.path.relpath(path, self.folder))
        self.reached(Point(when, operation, re.sub(r"[0-9a-f]{32}", "N", name)))
        self._busy = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or event not in _EVENTS:
            return
        if event == "open" and (isinstance(arguments[0], int) or not arguments[2] & _WRITING):
            return
        name, start = _EVENTS[event]
        path = _full(arguments[name], -1 if start is None else arguments[start])
        if not path.startswith(self.folder + os.sep):
            return
        self._at("before", event, path)
        self._open.append((event, path))
        if event in ("os.rename", "os.remove") and os.path.isfile(path) and os.stat(path).st_nlink == 1:
            self._durable.pop(os.stat(path).st_ino, None)  # the number may become another file's

    def _with_after(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            already = len(self._open)
            try:
                return call(*arguments, **named)
            finally:
                if len(self._open) > already:
                    event, path = self._open.pop()
                    if event == "os.link" and os.path.exists(path):  # bytes that were there before
                        self._durable[os.stat(path).st_ino] = os.stat(path).st_size
                    self._at("after", event, path)

        return wrapped

    def _fsync(self, call: Callable[[int], None]) -> Callable[[int], None]:
        def wrapped(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
            self._at("before", "fsync", path)
            call(descriptor)
            status = os.fstat(descriptor)
            self._durable[status.st_ino] = status.st_size
            self._at("after", "fsync", path)

        return wrapped

    def _serialize_file(self, call: Callable[..., None]) -> Callable[..., None]:
        def wrapped(tensors: Any, path: str, *more: Any, **named: Any) -> None:
            self._at("before", "write", os.fspath(path))
            call(tensors, path, *more, **named)
            self._at("after", "write", os.fspath(path))

        return wrapped


_CALLS = ("open", "link", "rename", "replace", "remove", "unlink", "rmdir", "mkdir", "truncate")
_EVENTS: dict[str, tuple[int, int | None]] = {
    "open": (0, None),
    "os.link": (1, 3),
    "os.rename": (1, 3),
    "os.remove": (0, 1),
    "os.rmdir": (0, 1),
    "os.mkdir": (0, 2),
    "os.truncate": (0, None),
}
"""Audit event -> where its arguments have the path that changes, and the folder that a relative one starts from."""


def _full(path: Any, folder: int) -> str:
    text = os.fsdecode(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text) if folder != -1 else os.path.abspath(text)


def _digest(*described: Any) -> str:
    return hashlib.sha256(repr(described).encode()).hexdigest()


def listing(folder: Path, notes: Path) -> None:
    """From now on, every point is written to `notes`."""
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT)

    def reached(point: Point) -> None:
        left, torn = watch.left()
        noted = replace(point, left=left, torn=torn)
        os.write(descriptor, json.dumps(asdict(noted)).encode() + b"\n")

    watch = Watch(folder, reached)


def keeping(folder: Path, kept: Path, deaths: Collection[Death]) -> None:
    """From now on, what a death at each of these points would leave of `folder` is copied to `kept_in(kept, death)`."""
    counter = itertools.count()

    def reached(point: Point) -> None:
        number = next(counter)
        for torn in (False, True):
            if (number, torn) in deaths:
                copy(folder, kept_in(kept, (number, torn)))
                if torn:
                    watch.tear(kept_in(kept, (number, torn)))

    watch = Watch(folder, reached)


def kept_in(kept: Path, death: Death) -> Path:
    return kept / f"{death[0]}{'-torn' if death[1] else ''}"


def copy(folder: Path, to: Path) -> None:
    """Copy with times and links."""
    subprocess.run(["cp", "-a", folder, to], check=True)


def read_points(notes: Path) -> list[Point]:
    return [Point(**json.loads(line)) for line in notes.read_text().splitlines()]
