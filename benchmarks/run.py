"""`python -m benchmarks.run`: measure the trainer against a bare loop, print the table, write the files."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    # Before torch loads OpenMP: a waiting thread that spins occupies a core that both sides need.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks import report
    from benchmarks.cells import CELLS
    from benchmarks.compare import GateError, run_cell
    from benchmarks.encoding import run_encoding
    from benchmarks.starts import run_starts

    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), help="only these; prints, and writes nothing")
    parser.add_argument("--rounds", type=_even, help="an even number, instead of what the time allows")
    parser.add_argument("--steps", type=int, help="steps of each side per round")
    parser.add_argument("--out", type=Path, help="folder with a README.md to write to, even with --cells")
    options = parser.parse_args(arguments)

    rows: list[dict[str, Any]] = []
    for name in options.cells or CELLS:
        with tempfile.TemporaryDirectory(prefix="sd3tune-bench-") as folder:
            try:
                rows.append(run_cell(CELLS[name], Path(folder), options.rounds, options.steps))
            except GateError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    results = {"environment": report.environment(), "cells": rows}
    if not options.cells:
        for name, measure in (("encoding", run_encoding), ("starts", run_starts)):
            with tempfile.TemporaryDirectory(prefix="sd3tune-bench-") as folder:
                results[name] = measure(Path(folder))
    print(report.table(results))
    if options.out or not options.cells:
        report.write(results, options.out or Path(__file__).parent)
    return 0


def _even(text: str) -> int:
    rounds = int(text)
    if rounds < 2 or rounds % 2:
        raise argparse.ArgumentTypeError("an even number, at least 2: the sides swap places every other round")
    return rounds


if __name__ == "__main__":
    sys.exit(main())
