"""Measure the time that a process spends on imports, to separate it from the rest."""

from __future__ import annotations

import builtins
import importlib
import threading
import time
from collections.abc import Callable
from typing import Any


class ImportClock:
    """Clock for imports in the main thread after `install`; nested imports count once."""

    def __init__(self) -> None:
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self._inside = False

    def install(self) -> None:
        builtins.__import__ = self._timed(builtins.__import__)
        importlib.import_module = self._timed(importlib.import_module)

    def _timed(self, load: Callable[..., Any]) -> Callable[..., Any]:
        main = threading.main_thread()

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._inside or threading.current_thread() is not main:
                return load(*arguments, **options)
            self._inside, started, cpu = True, time.monotonic(), time.process_time()
            try:
                return load(*arguments, **options)
            finally:
                self._inside = False
                self.seconds += time.monotonic() - started
                self.cpu_seconds += time.process_time() - cpu

        return timed
