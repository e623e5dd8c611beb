"""`sd3tune train` in a process of its own, forked from one that has imported the libraries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

from tests.forks import FORKS


class Ended(NamedTuple):
    code: int
    printed: str


class Attempt:
    """A started `sd3tune train FOLDER/run.yaml ...`; `inside` is called in its process first."""

    def __init__(self, folder: Path, *more: str, inside: Callable[[], object] = bool) -> None:
        self._log = folder / "printed"
        command = ("train", str(folder / "run.yaml"), *more)
        self.process: BaseProcess = FORKS.Process(target=_run, args=(command, str(self._log), inside))
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    def end(self) -> Ended:
        """Wait for it."""
        self.process.join(120)
        assert self.process.exitcode is not None, "still running"
        return Ended(self.process.exitcode, self._log.read_text())


def _run(command: tuple[str, ...], log: str, inside: Callable[[], object]) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ["OMP_NUM_THREADS"] = "1"
    from sd3tune.cli.main import run

    inside()
    sys.argv = ["sd3tune", *command]
    run()
