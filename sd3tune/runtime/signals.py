"""Ctrl-C, SIGTERM and the end of the parent: training saves the current step; other work stops at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

from sd3tune.reporting import say

STOP_WITH_PARENT = "SD3TUNE_STOP_WITH_PARENT"
"""Environment variable of a command whose standard input is a pipe of its parent, which ends when the parent dies."""


def stop_with_parent() -> None:
    """If the environment asks for it, stop this process as Ctrl-C would once its standard input ends."""
    if os.environ.pop(STOP_WITH_PARENT, None):
        threading.Thread(target=_stop_at_end_of_input, daemon=True).start()


def _stop_at_end_of_input() -> None:
    while os.read(sys.stdin.fileno(), 1024):
        pass
    os.kill(os.getpid(), signal.SIGINT)


class StopSignals:
    """A context manager that treats SIGTERM as Ctrl-C. Inside `deferred`, the first signal only sets `asked`."""

    def __init__(self) -> None:
        self.asked = False
        self._deferring = False
        self._former: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # only the main thread may set handlers
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the body end by itself once `asked` is set. A second signal interrupts it."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring or self.asked:
            raise KeyboardInterrupt
        self.asked = True
        say("", "stopping after this step, once it is saved; press Ctrl-C again to stop now", aside=True)
