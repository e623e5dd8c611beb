"""`python -m benchmarks.run`: measure the trainer against a bare loop, print the table, write the files."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# Before torch loads OpenMP: threads that spin while they wait would burn the cores that both sides need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from benchmarks import report
from benchmarks.cells import CELLS
from benchmarks.compare import GateError, run_cell


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), help="only these; prints, and writes nothing")
    parser.add_argument("--rounds", type=int, help="an even number, instead of what the time allows")
    parser.add_argument("--steps", type=int, help="steps of each side per round")
    parser.add_argument("--out", type=Path, help="folder with results/ and README.md to write to")
    options = parser.parse_args(arguments)

    rows = []
    for name in options.cells or CELLS:
        with tempfile.TemporaryDirectory(prefix="sd3tune-bench-") as folder:
            try:
                rows.append(run_cell(CELLS[name], Path(folder), options.rounds, options.steps))
            except GateError as error:
                print(f"error: {error}", file=sys.stderr)
                return 1
    results = {"environment": report.environment(), "cells": rows}
    print(report.table(results))
    if options.out or not options.cells:
        report.write(results, options.out or Path(__file__).parent)
    return 0


if __name__ == "__main__":
    sys.exit(main())
