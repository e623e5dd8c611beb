"""`full_size.py CELL ...`: count a step at full size; a cell is BASE,PIXELS,PRECISION,CHECKPOINTING and maybe ,example.

It is a step of the trainer, or of diffusers' example. Each cell tells as a fact the counts of its second step, the
peaks of torch's allocator in the first two, and the peak that the forecast `planned` for the trainer.
"""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import sd3tune.model.compute.fast.attention as attention
from benchmarks.gpu.cells import SHAPES, Cell
from benchmarks.gpu.models import config_of
from benchmarks.gpu.sides import SIDE_CLASSES, Example, Ours
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.methods import LoraMethod
from sd3tune.model.base.resolve import shape_of_base
from tests.nullgpu.counts import counting, fact
from tests.nullgpu.programs.bench import first_timesteps

# The norms' weights are written by a kernel, so they are zero here; a real model's are not.
attention.is_invertible = lambda norm: True
Example._timesteps = first_timesteps


def planned(cell: Cell) -> int:
    config = config_of(cell, SHAPES["full"])
    size = (cell.pixels, cell.pixels)
    return rehearse_training(config, shape_of_base(config.model), LoraMethod(config), size, torch.bfloat16).peak


def measured(cell: Cell, kind: type[Ours] | type[Example]) -> dict[str, Any]:
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory(prefix="nullgpu-") as folder:
        side = kind(cell, SHAPES["full"], device, Path(folder))
        torch.cuda.reset_peak_memory_stats(device)
        try:
            side.step()
            with counting() as seen:
                side.step()
        finally:
            side.close()
        return {
            **seen.counts,
            "waits": seen.waits,
            "kernels": seen.kernels,
            "host_ms": seen.host_ms,
            "allocated": torch.cuda.max_memory_allocated(),
            "reserved": torch.cuda.max_memory_reserved(),
            "planned": planned(cell),
        }


for argument in sys.argv[1:]:
    base, pixels, precision, checkpointing, *example = argument.split(",")
    kind = SIDE_CLASSES["example" if example else "sd3tune"]
    fact(argument, measured(Cell(base, int(pixels), 1, precision, checkpointing), kind))
    gc.collect()
    torch.cuda.empty_cache()
