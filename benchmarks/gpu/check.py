"""`python -m benchmarks.gpu.check`: is training on this GPU right? In under four minutes, before anything is timed.

It trains `tiny` and fails if the host waits in a steady step; compares outputs and gradients of every path with the
plain one in fp32; compares the kinds of attention; and compares allocated and reserved memory of one full-size model
with its plan. Each finding is printed and written to `check.json` as it comes. The exit code is 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.gpu.options import parser_for, run_on_device


@dataclass(frozen=True)
class Finding:
    """One comparison."""

    check: str
    what: str
    value: float | None
    """None if it could not be measured."""
    limit: float | None
    """The largest value that passes; None for a value that is only reported."""
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.value is None:
            return not self.note.startswith("failed")
        return self.limit is None or self.value <= self.limit

    def __str__(self) -> str:
        shown = "-" if self.value is None else f"{self.value:.3g}"
        limit = "" if self.limit is None else f", at most {self.limit:.3g}"
        note = f" ({self.note})" if self.note else ""
        return f"{'ok    ' if self.passed else 'FAILED'} {self.check}: {self.what}: {shown}{limit}{note}"


def main(arguments: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = parser_for(
        "benchmarks.gpu.check", __doc__, 4.0, "begin no check after this", "runs/check-gpu", "check.json"
    )
    parser.add_argument("--only", help="one check, such as 'steady steps'")
    options = parser.parse_args(arguments)
    return run_on_device(options, partial(_run, options, started + 60 * options.minutes))


def _run(options: argparse.Namespace, deadline: float, device: Any, shapes: Any) -> int:
    from benchmarks.gpu import report
    from benchmarks.gpu.checks import CHECKS

    findings: list[Finding] = []
    results: dict[str, Any] = {"environment": report.environment(device), "command": "python -m benchmarks.gpu.check"}
    chosen = {name: check for name, check in CHECKS.items() if options.only in (None, name)}
    if not chosen:
        print(f"error: --only {options.only}: none of {', '.join(CHECKS)}", file=sys.stderr)
        return 2
    for name, check in chosen.items():
        for finding in _found(name, partial(check, device, shapes, options.out), deadline):
            findings.append(finding)
            print(finding, flush=True)
            results["findings"] = [{**asdict(one), "passed": one.passed} for one in findings]
            (options.out / "check.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
        device.clear()
    failed = [one for one in findings if not one.passed]
    print(f"\n{len(findings) - len(failed)} of {len(findings)} passed; {options.out / 'check.json'}")
    return 1 if failed else 0


def _found(name: str, check: Callable[[], Iterator[Finding]], deadline: float) -> Iterator[Finding]:
    """Yield a check's findings; one that raises is a finding, too."""
    from benchmarks.gpu.device import outcome_of

    if time.monotonic() > deadline:
        yield Finding(name, "all", None, None, "not begun: the time was over")
        return
    try:
        yield from check()
    except Exception as error:  # a failure of a library must not stop the other checks
        yield Finding(name, "all", None, None, f"failed: {outcome_of(error).removeprefix('failed: ')}")


if __name__ == "__main__":
    sys.exit(main())
