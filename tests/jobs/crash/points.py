"""The moments at which a run could die: before and after every change that it makes to a file or a folder."""

from __future__ import annotations

import builtins
import functools
import io
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch

DIED = 9
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Point:
    when: str
    """`before` or `after`."""
    operation: str
    name: str
    """The path in the workspace, without what differs from run to run."""
    unsynced: bool = False
    """Whether bytes were written that no fsync has made durable: here a write can be torn."""

    @property
    def kind(self) -> tuple[str, str]:
        """The operation, and the sort of file or folder."""
        return self.operation, re.sub(r"\d{4,}|^\.tmp-(old-|removed-)?", "N", Path(self.name).name)


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

    def tear(self) -> None:
        """Leave half of what was written since the last fsync of each file, as a write that was cut off would."""
        for path in self._files():
            size, durable = os.stat(path).st_size, self._durable.get(os.stat(path).st_ino, 0)
            if size > durable:
                os.truncate(path, durable + (size - durable) // 2)

    def _files(self) -> list[str]:
        return [os.path.join(root, name) for root, _, names in os.walk(self.folder) for name in names]

    def unsynced(self) -> bool:
        found = map(os.stat, self._files())
        return any(status.st_size > self._durable.get(status.st_ino, 0) for status in found)

    def _at(self, when: str, operation: str, path: str) -> None:
        self._busy = True
        name = re.sub(r"\.tmp-\d+-", ".tmp-", os.path.relpath(path, self.folder))
        self.reached(Point(when, operation, re.sub(r"[0-9a-f]{32}", "N", name)))
        self._busy = False

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._busy or event not in _EVENTS:
            return
        place = _EVENTS[event]
        if event == "open" and (isinstance(arguments[0], int) or not arguments[2] & _WRITING):
            return
        path = _full(arguments[0], arguments[place] if place else -1)
        if not path.startswith(self.folder + os.sep):
            return
        gone = _full(arguments[1], arguments[3]) if event == "os.rename" else path
        self._at("before", event, gone)
        self._open.append((event, gone))
        if event in ("os.rename", "os.remove") and os.path.isfile(gone):
            self._durable.pop(os.stat(gone).st_ino, None)  # the number may become another file's

    def _with_after(self, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            already = len(self._open)
            try:
                return call(*arguments, **named)
            finally:
                if len(self._open) > already:
                    self._at("after", *self._open.pop())

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


_CALLS = ("open", "rename", "replace", "remove", "unlink", "rmdir", "mkdir", "truncate")
_EVENTS = {"open": 0, "os.rename": 2, "os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.truncate": 0}
"""Audit event -> where its arguments have the folder that a relative path starts from."""


def _full(path: Any, folder: int) -> str:
    text = os.fsdecode(path)
    return os.path.join(os.readlink(f"/proc/self/fd/{folder}"), text) if folder != -1 else os.path.abspath(text)


def listing(folder: Path, notes: Path) -> None:
    """From now on, every point is written to `notes`."""
    descriptor = os.open(notes, os.O_WRONLY | os.O_CREAT)

    def reached(point: Point) -> None:
        noted = replace(point, unsynced=watch.unsynced())
        os.write(descriptor, json.dumps(asdict(noted)).encode() + b"\n")

    watch = Watch(folder, reached)


def dying(folder: Path, number: int, torn: bool) -> None:
    """From now on, the process ends itself at the point of that number, without any farewell."""
    counter = iter(range(number))

    def reached(point: Point) -> None:
        if next(counter, None) is None:
            if torn:
                watch.tear()
            os._exit(DIED)

    watch = Watch(folder, reached)


def read_points(notes: Path) -> list[Point]:
    return [Point(**json.loads(line)) for line in notes.read_text().splitlines()]
