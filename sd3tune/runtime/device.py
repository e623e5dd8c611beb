"""Device and precision of a run, with accelerate."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from sd3tune import __version__
from sd3tune.errors import RunError
from sd3tune.runtime.environment import (
    drop_sharding,
    gpu_asked_for,
    keeps_dead_addresses,
    launch_problems,
    no_gpu,
    restarts,
    sharding_problems,
    uses_cpu,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


def make_accelerator(
    accumulation: int = 1, timeout_minutes: float | None = None, sharding: str = "none"
) -> Accelerator:
    """Set up device and process group. Accelerate's own settings of precision and accumulation are overridden.

    A process that waits longer than `timeout_minutes` for the others ends with an error; by default as torch sets it,
    10 minutes with NCCL. `sharding` is `train.sharding`.
    Raises RunError if the environment asks for a missing GPU or a split model, or describes an incomplete launch.
    """
    problems = launch_problems(os.environ) + sharding_problems(os.environ, sharding)
    asked = gpu_asked_for(os.environ)
    if asked and not torch.cuda.is_available():
        problems.append(no_gpu(asked))
    if problems:
        raise RunError(*problems)
    drop_sharding(os.environ)
    if keeps_dead_addresses(os.environ):
        _join_again(timeout_minutes)
    limits = [] if timeout_minutes is None else [InitProcessGroupKwargs(timeout=timedelta(minutes=timeout_minutes))]
    try:
        accelerator = Accelerator(
            mixed_precision="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulation),
            kwargs_handlers=limits,
        )
    except (ValueError, RuntimeError, ImportError) as error:
        ours = [f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith("ACCELERATE_")]
        where = f"; the environment has {', '.join(ours)}" if ours else ""
        raise RunError(f"the processes could not be set up: {' '.join(str(error).split())[:300]}{where}") from error
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world > 1 and accelerator.num_processes == 1:  # each process would train alone, in the same folder
        raise RunError(
            f"WORLD_SIZE={world}: accelerate sets up one process where torch finds no GPU; "
            "on the CPU start them with --num-processes"
        )
    return accelerator


def _join_again(timeout_minutes: float | None) -> None:
    """Join the process group of a restarted launch, with keys of its own in the launcher's store.

    torch's launcher keeps one store for all attempts, and its processes would connect to those of the attempt before.
    On several machines the number of the attempt is not the same everywhere. Raises RunError there.
    """
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise RunError(
            "torchrun: it restarts processes, and keeps the addresses of those that died; set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it on every machine"
        )
    store, rank, world = next(rendezvous("env://"))
    torch.distributed.init_process_group(
        "nccl" if torch.cuda.is_available() and not uses_cpu(os.environ) else "gloo",
        store=PrefixStore(f"attempt-{restarts(os.environ)}", store),
        rank=rank,
        world_size=world,
        timeout=None if timeout_minutes is None else timedelta(minutes=timeout_minutes),
    )


@dataclass(frozen=True)
class Gpu:
    name: str
    has_bf16: bool
    """True if in hardware: emulated bf16 is slower than fp32."""


def gpu_of(device: torch.device) -> Gpu | None:
    """Return name and bf16 support of a CUDA device; None for other devices."""
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):
        return Gpu(torch.cuda.get_device_name(device), torch.cuda.is_bf16_supported(including_emulation=False))


def choose_dtype(wanted: str, gpu: Gpu | None, asked_by: str = "model.dtype") -> torch.dtype:
    """Return a dtype by name. `auto` is fp32 without a GPU, bf16 on a GPU that has it, else fp16.

    Raises RunError for bf16 on a GPU without it.
    """
    if wanted == "auto":
        if gpu is None:
            return torch.float32
        return torch.bfloat16 if gpu.has_bf16 else torch.float16
    if wanted == "bf16" and gpu is not None and not gpu.has_bf16:
        raise RunError(f"{asked_by}: bf16: {gpu.name} has no bf16; use fp16 or auto")
    return DTYPES[wanted]


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value is dtype)


def versions() -> dict[str, str]:
    """Return the versions of sd3tune, Python and the main libraries."""
    found = {"sd3tune": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in LIBRARIES}
