"""Options that the commands for a GPU share, and the device and shapes that they choose."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.bundle import NoBundle, importable

NO_GPU = (
    "torch sees no CUDA device: measure on a machine with a GPU, or run the same code on the CPU by "
    "--device cpu --shapes tiny"
)


def parser_for(
    program: str, description: str | None, minutes: float, limit: str, out: str, files: str
) -> argparse.ArgumentParser:
    """Return a parser with the shared options. `limit` says what `--minutes` does, and `files` what `--out` gets."""
    parser = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    parser.add_argument("--bundle", type=Path, help="the folder that benchmarks.gpu.bundle made")
    parser.add_argument("--minutes", type=float, default=minutes, help=limit)
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder for {files}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", choices=("full", "tiny"), help="by default full; tiny on the CPU")
    return parser


def run_on_device(options: argparse.Namespace, run: Callable[[Any, Any], int]) -> int:
    """Return `run(device, shapes)`, with the bundle on the import path and the output folder made.

    Prints an error and returns 2 without the bundle or the GPU.
    """
    try:
        with importable(options.bundle):
            import torch

            if options.device == "cuda" and not torch.cuda.is_available():
                print(f"error: {NO_GPU}", file=sys.stderr)
                return 2
            from benchmarks.gpu.cells import SHAPES
            from benchmarks.gpu.device import Cpu, Cuda

            options.out.mkdir(parents=True, exist_ok=True)
            on_gpu = options.device == "cuda"
            return run(Cuda() if on_gpu else Cpu(), SHAPES[options.shapes or ("full" if on_gpu else "tiny")])
    except NoBundle as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
