"""`python -m benchmarks.peer.stamped STAMPS ours|peer ...`: run one side's command and record the times of its steps.

Both sides are measured by the same torch hook, which is called after every optimizer step.
`ours` is followed by sd3tune's arguments, `peer` by the script and its own. STAMPS receives JSON: {"steps": [[ended,
went on], ...], "peak_bytes": n, "imports": [seconds, CPU seconds]}. Both times of a step are [seconds, CPU seconds], of
the machine's monotonic clock and of the process; they differ if it waited for its turn. Imports count until the end
of the first step.
"""

from __future__ import annotations

import gc
import json
import re
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer.imports import ImportClock

IMPORTS = ImportClock()
IMPORTS.install()
gc.disable()  # as sd3tune does; the script gets the same advantage
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

gc.enable()
from benchmarks.peer.accommodations import with_casting_vae, without_trackers  # noqa: E402
from benchmarks.peer.turns import Turns  # noqa: E402

Clocks = tuple[float, float]


def main(arguments: Sequence[str]) -> None:
    stamps_file, side, *rest = arguments
    stamps: list[tuple[Clocks, Clocks]] = []
    imports: list[float] = []
    turns = Turns.from_environment()

    def stamp(*_: Any) -> None:
        ended = clocks()
        if not stamps:
            imports.extend((IMPORTS.seconds, IMPORTS.cpu_seconds))
        if turns is not None:
            turns.pass_on()
        stamps.append((ended, clocks()))

    register_optimizer_step_post_hook(stamp)
    try:
        run_side(side, rest)
    finally:
        seen = {"steps": stamps, "peak_bytes": peak_bytes(), "imports": imports}
        Path(stamps_file).write_text(json.dumps(seen), encoding="utf-8")


def clocks() -> Clocks:
    return time.monotonic(), time.process_time()


def run_side(side: str, arguments: Sequence[str]) -> None:
    """Run `python -m sd3tune ...` or `python script ...` in this process."""
    without_trackers()
    if side == "ours":
        sys.argv = ["sd3tune", *arguments]
        runpy.run_module("sd3tune", run_name="__main__")
    else:
        if "diffusers" in Path(arguments[0]).read_text(encoding="utf-8"):
            with_casting_vae()
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def peak_bytes() -> int:
    """Return the peak resident size. `ru_maxrss` would include the process from which this one was forked."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    main(sys.argv[1:])
