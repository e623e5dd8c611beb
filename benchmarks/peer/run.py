"""`python -m benchmarks.peer.run SCRIPT`: check that both sides agree, measure all cells, write the files."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peer.cells import CELLS, CORES, METRICS, PeerCell
from benchmarks.peer.commands import peer_arguments
from benchmarks.peer.measure import measure_cell, rows
from benchmarks.peer.processes import ROOT, RunFailed, environment

GATED = CELLS["tiny-fp32-one"]
_SIGN = "--precondition_outputs"
"""A flag that only the right script has, not the similar ones for text-to-image, SDXL or Flux."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer.run", description=__doc__)
    parser.add_argument("script", type=Path, help="train_dreambooth_lora_sd3.py of diffusers' examples")
    parser.add_argument("--cells", nargs="+", choices=list(CELLS), help="only these; prints, and writes nothing")
    parser.add_argument(
        "--out", type=Path, help="folder with a README.md to write to, with --cells as well: other rows stay"
    )
    options = parser.parse_args(arguments)
    problem = problem_of(options.script)
    if problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    out = options.out or (None if options.cells else Path(__file__).parents[1])
    try:
        results = measure([CELLS[name] for name in options.cells or CELLS], options.script.resolve(), out)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    from benchmarks.peer import report

    print(report.table(results))
    return 0


def measure(cells: Sequence[PeerCell], script: Path, out: Path | None) -> dict[str, Any]:
    """Return the results of the cells, after the gate; each is written to `out` when known. Raises RunFailed."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    os.environ.update(environment())
    from benchmarks.peer import report
    from benchmarks.peer.materials import make_materials

    with tempfile.TemporaryDirectory(prefix="sd3tune-peer-") as name:
        folder = Path(name)
        materials = make_materials(folder, list(dict.fromkeys(["tiny", *(cell.base for cell in cells)])))
        results: dict[str, Any] = {
            "environment": report.environment(),
            "command": "make bench PEER_SCRIPT=train_dreambooth_lora_sd3.py",
            "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
            "gate": run_gate(script, peer_arguments(GATED, materials, folder, folder / "gate"), folder),
            "cells": [],
        }
        print(f"gate: {json.dumps(results['gate'])}", flush=True)
        for cell in cells:
            results["cells"] += rows(cell, measure_cell(cell, script, materials, folder))
            for row in results["cells"][-len(METRICS) :]:
                both = f"ours {row['ours']:.4g}, peer {row['peer']:.4g} {row['unit']}"
                print(f"{row['cell']}: {row['ratio']:.3f}, in CPU time {row['cpu_ratio'] or 0:.3f}; {both}", flush=True)
            if out is not None:
                report.write(results, out)
    return results


def run_gate(script: Path, arguments: Sequence[str], folder: Path) -> dict[str, Any]:
    """Run the gate in its own process. Raises RunFailed if it does not pass."""
    file, log = folder / "gate.json", folder / "gate.log"
    base = arguments[arguments.index("--pretrained_model_name_or_path") + 1]
    command = [sys.executable, "-m", "benchmarks.peer.gate", base, str(file), str(script), *arguments]
    with log.open("w") as output:
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, check=False).returncode
    if code:
        raise RunFailed(f"gate: exit code {code}:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
    gate: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    if not gate["passed"]:
        raise RunFailed(f"gate: the two sides do not compute the same, so nothing was timed: {json.dumps(gate)}")
    return gate


def problem_of(script: Path) -> str | None:
    """Return the fault of the script's path in one line, or None."""
    expected = "PEER_SCRIPT is the path of diffusers' examples/dreambooth/train_dreambooth_lora_sd3.py"
    if not script.is_file():
        return f"{script}: no such file; {expected}"
    text = script.read_text(encoding="utf-8", errors="replace")
    if _SIGN not in text or "SD3Transformer2DModel" not in text:
        return f"{script}: not that script (it has no {_SIGN}); {expected}"
    return None


if __name__ == "__main__":
    sys.exit(main())
