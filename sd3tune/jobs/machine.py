"""The device, the precision and the processes of a run, from accelerate."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from importlib import metadata

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

from sd3tune import __version__
from sd3tune.errors import RunError
from sd3tune.train.loop import Processes

ALONE = Processes(0, 1, lambda tensor: tensor, lambda tensor: tensor[None], lambda: None)
"""A single process: none of the collective operations does anything."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def make_accelerator(accumulation: int = 1) -> Accelerator:
    """Device and process group. Precision and accumulation are ours, whatever the environment or a config file says."""
    try:
        return Accelerator(
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
        )
    except (ValueError, RuntimeError) as error:
        raise RunError(f"the processes could not be set up: {' '.join(str(error).split())[:300]}") from error


def processes_of(accelerator: Accelerator) -> Processes:
    """The collective operations that training needs."""
    if accelerator.num_processes == 1:
        return ALONE
    return Processes(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        reduce_mean=lambda tensor: accelerator.reduce(tensor, reduction="mean"),
        gather=lambda tensor: accelerator.gather(tensor[None]),
        wait=accelerator.wait_for_everyone,
    )


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: fp32 on the CPU, bf16 on a GPU that has it, else fp16. Raises RunError for bf16 on a GPU without it."""
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if wanted == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(device)
        raise RunError(f"model.dtype: {name} has no bf16; use fp16 or auto")
    return DTYPES[wanted]


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)


def versions() -> dict[str, str]:
    found = {"sd3tune": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in LIBRARIES}


@contextlib.contextmanager
def closing_process_group() -> Iterator[None]:
    """Leave the process group at the end, which torch warns about otherwise."""
    try:
        yield
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
