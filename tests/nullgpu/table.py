"""`python -m tests.nullgpu.table [CHECKOUT]`: count a step of the released models on the stand-in.

Prints a table in Markdown: kernels (cuBLAS's included), waits of the host, pageable bytes, host time, and the peak of
torch's allocator, for this code, or another checkout of it, and for diffusers' example. It takes ten minutes.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from benchmarks.gpu.cells import SHAPES
from tests.nullgpu.run import ROOT, run_on_null_gpu

PROGRAM = Path("tests", "nullgpu", "programs", "full_size.py")
COLUMNS = ("kernels", "waits", "pageable MB", "host ms", "allocated GB", "reserved GB", "planned GB")


def main(arguments: list[str]) -> None:
    checkout = Path(arguments[0]).resolve() if arguments else ROOT
    print(f"| model | px | checkpointing | side | {' | '.join(COLUMNS)} |\n|{' --- |' * (4 + len(COLUMNS))}")
    for base, pixels, checkpointing in itertools.product(
        SHAPES["full"].bases, (512, 1024), ("none", "selective", "block")
    ):
        sides = {"sd3tune": ""}
        if checkpointing != "selective":  # which the example lacks
            sides["example"] = ",example"
        for side, suffix in sides.items():
            cell = f"{base},{pixels},bf16,{checkpointing}{suffix}"
            ran = run_on_null_gpu(
                PROGRAM,
                cell,
                cwd=checkout,
                PYTHONPATH=str(checkout),
                PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True",
            ).succeeded()
            found = ran.facts[cell]
            shown = (
                found["launches"] + found["products"],
                sum(found["waits"].values()),
                f"{found['pageable_bytes'] / 1e6:.1f}",
                f"{found['host_ms']:.0f}",
                *(f"{found[name] / 1e9:.2f}" for name in ("allocated", "reserved")),
                "" if suffix else f"{found['planned'] / 1e9:.2f}",
            )
            print(f"| {base} | {pixels} | {checkpointing} | {side} | {' | '.join(map(str, shown))} |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
