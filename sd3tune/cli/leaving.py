"""Quick ends: taking a million objects of torch and diffusers apart, one by one, is for nothing when a process ends."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable


def leave_after(command: Callable[[], None]) -> None:
    """Run the command of this process, which ends with its exit code: what comes later is left to the system.

    Python first waits for threads and calls what was registered to run at exit, the latest first; it then would spend
    a second or two on collecting garbage. A process with a traceback on its way ends as ever.
    """
    ended = _Ended()
    atexit.register(ended.leave)  # before the command registers anything, so after all that it registers
    try:
        command()
        ended.code = 0
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            ended.code = error.code or 0
        raise


class _Ended:
    code: int | None = None

    def leave(self) -> None:
        if self.code is None:
            return
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, ValueError):  # nobody reads any more
            self.code = self.code or 120  # as Python has it
        os._exit(self.code)
