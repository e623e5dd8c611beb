"""`python -m tests.nullgpu.table [CHECKOUT]`: count a step of the released models on the stand-in.

Prints a table in Markdown: kernels (cuBLAS's included), waits of the host, pageable bytes, host time, and the peak of
torch's allocator, for this code, or another checkout of it, and for diffusers' example. It takes ten minutes.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.cells import SHAPES
from tests.nullgpu.run import ROOT, SITE, run_on_null_gpu

PROGRAM = Path("tests", "nullgpu", "programs", "full_size.py")
COLUMNS = ("kernels", "waits", "pageable MB", "host ms", "allocated GB", "reserved GB", "planned GB")


def main(arguments: list[str]) -> None:
    checkout = Path(arguments[0]).resolve() if arguments else ROOT
    print(f"| model | px | checkpointing | side | {' | '.join(COLUMNS)} |\n|{' --- |' * (4 + len(COLUMNS))}")
    for base in SHAPES["full"].bases:
        cells = [
            f"{base},{pixels},bf16,{checkpointing}{side}"
            for pixels, checkpointing in itertools.product((512, 1024), ("none", "selective", "block"))
            for side in ("", ",example")
            if not (side and checkpointing == "selective")  # which the example lacks
        ]
        ran = run_on_null_gpu(
            PROGRAM,
            *cells,
            cwd=checkout,
            timeout=3600.0,
            PYTHONPATH=os.pathsep.join(map(str, (SITE, checkout))),
            PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
        ).succeeded()
        for cell in cells:
            print(_row(cell, ran.facts[cell]), flush=True)


def _row(cell: str, found: dict[str, Any]) -> str:
    base, pixels, _, checkpointing, *example = cell.split(",")
    shown = (
        found["launches"] + found["products"],
        sum(found["waits"].values()),
        f"{found['pageable_bytes'] / 1e6:.1f}",
        f"{found['host_ms']:.0f}",
        *(f"{found[name] / 1e9:.2f}" for name in ("allocated", "reserved")),
        "" if example else f"{found['planned'] / 1e9:.2f}",
    )
    side = "example" if example else "sd3tune"
    return f"| {' | '.join(map(str, (base, pixels, checkpointing, side, *shown)))} |"


if __name__ == "__main__":
    main(sys.argv[1:])
