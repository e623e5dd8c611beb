"""Environment variables of a launch: ranks, model sharding, GPUs, and their allocator. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path

import yaml

from sd3tune.invocation import command_line

_PLACE = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = "a launcher sets it, or left it behind: unset it, and start several processes with --num-processes"


def launch_problems(environment: Mapping[str, str]) -> list[str]:
    """Return the problems of the launcher's variables, such as WORLD_SIZE and RANK; empty if none is set.

    Incomplete variables would otherwise be ignored. One of two processes would then train alone, or wait forever.
    """
    given = {
        name: environment[name] for name in (*_PLACE, *_RENDEZVOUS) if environment.get(name, "-1") not in ("", "-1")
    }
    odd = [name for name, value in given.items() if name != "MASTER_ADDR" and not value.isdecimal()]
    if odd:
        return [f"{name}={given[name]}: not a whole number; {_WAY_OUT}" for name in odd]
    ranks = {name: int(given[name]) for name in ("RANK", "LOCAL_RANK") if name in given}
    if "WORLD_SIZE" not in given:
        return [f"{name}={rank}: set without WORLD_SIZE; {_WAY_OUT}" for name, rank in ranks.items()]
    world = int(given["WORLD_SIZE"])
    if world == 0:
        return [f"WORLD_SIZE=0: at least 1; {_WAY_OUT}"]
    missing = [name for name in (*_PLACE, *_RENDEZVOUS) if name not in given]
    if world > 1 and missing:
        return [f"WORLD_SIZE={world}: set without {', '.join(missing)}; {_WAY_OUT}"]
    return [
        f"{name}={rank}: at most {world - 1} with WORLD_SIZE={world}; {_WAY_OUT}"
        for name, rank in ranks.items()
        if rank >= world
    ]


_RESTARTS, _MOST_RESTARTS = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"


def restarts(environment: Mapping[str, str]) -> int:
    """Return how often torch's launcher has started the processes again."""
    count = environment.get(_RESTARTS, "")
    return int(count) if count.isdecimal() else 0


def launch_names(environment: Mapping[str, str]) -> list[str]:
    """Return names of the launch that restarted processes share: of its agent here and, if it has one, of its job.

    Empty if the launcher restarts no processes.
    """
    if environment.get(_MOST_RESTARTS, "0") == "0":
        return []
    job = environment.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's default, which all launches have
    names = [f"{platform.node()} {os.getppid()}", *([job] if job != "none" else [])]
    return [hashlib.sha256(name.encode()).hexdigest()[:16] for name in names]


def continues(recorded: object, environment: Mapping[str, str]) -> bool:
    """Return whether a run that recorded `launch_names` was begun by this launch, which has restarted its processes.

    An agent starts its processes only once, unless it restarts them; the count may differ between machines. A job's
    name may be used again, so it counts in a restarted process only.
    """
    names = launch_names(environment)
    known = names if restarts(environment) > 0 else names[:1]
    return isinstance(recorded, list) and any(name in recorded for name in known)


def keeps_dead_addresses(environment: Mapping[str, str]) -> bool:
    """Return whether the launcher's store, in which processes find each other, outlives them."""
    return restarts(environment) > 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


_SHARDING = {"DEEPSPEED": "DeepSpeed", "FSDP": "FSDP", "MEGATRON_LM": "Megatron-LM"}
"""Sharding methods by accelerate's name, in ACCELERATE_USE_... and as `distributed_type`."""
_FSDP = "ACCELERATE_USE_FSDP"


def sharding_problems(environment: Mapping[str, str], sharding: str = "none") -> list[str]:
    """Return a problem for each variable that asks for another sharding than `train.sharding`.

    `accelerate launch` sets them, from its options or its configuration.
    """
    problems = []
    for name in (f"ACCELERATE_USE_{way}" for way in (*_SHARDING, "PARALLELISM_CONFIG")):
        if not _is_true(environment.get(name, "")) or (name == _FSDP and sharding == "fsdp"):
            continue
        why = "train.sharding is none" if name == _FSDP else "sd3tune divides a model only by train.sharding: fsdp"
        or_and = "or" if name == _FSDP else "and"
        ours = "" if sharding == "fsdp" else f"set train.sharding=fsdp, {or_and} "
        problems.append(f"{name}={environment[name]}: {why}; {ours}{_change_of(environment)}")
    return problems


def _change_of(environment: Mapping[str, str]) -> str:
    """Return the change that makes accelerate's launcher ask for no sharding."""
    file, _ = _default_configuration(environment)
    if file is not None:
        return f"write distributed_type: MULTI_GPU in {file}"
    return "unset it, or write distributed_type: MULTI_GPU in the configuration of accelerate that sets it"


def drop_sharding(environment: MutableMapping[str, str]) -> None:
    """Remove accelerate's request for FSDP: `train.sharding` says the same, and accelerate wraps no model here."""
    environment.pop(_FSDP, None)


def sharding_ignored(environment: Mapping[str, str], sharding: str = "none", world: int = 2) -> list[str]:
    """Return a note if a request for sharding has no effect: of accelerate's configuration, or of `train.sharding`.

    Only `accelerate launch` reads accelerate's default configuration.
    """
    if sharding != "none":
        alone = f"train.sharding: {sharding} has no effect with one process; start several with --num-processes"
        return [alone] if world == 1 else []
    file, way = _default_configuration(environment)
    if way is None:
        return []
    asks = f"{file} asks for {_SHARDING[way]}; only `accelerate launch` reads it, and sd3tune trains without"
    return [f"{asks}: set train.sharding=fsdp to divide the model"]


def _default_configuration(environment: Mapping[str, str]) -> tuple[Path | None, str | None]:
    """Return accelerate's default configuration that asks for sharding, and the method; None for both if none does."""
    cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(environment.get("HF_HOME") or f"{cache}/huggingface").expanduser() / "accelerate"
    for file in (folder / "default_config.yaml", folder / "default_config.json"):
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            continue
        way = str(values.get("distributed_type") if isinstance(values, dict) else None).upper()
        if way in _SHARDING:
            return file, way
    return None, None


_ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that configure torch's allocator, the first under its name in every version from torch 2.8 on."""


def grow_segments(environment: MutableMapping[str, str], release: str = platform.release()) -> None:
    """Set `expandable_segments:True` for torch's allocator on GPUs, unless the environment configures it.

    Memory that is free, but in pieces too small for a tensor, then is 1 to 4 % of a run's instead of about 11 %. torch
    reads the variable when it is imported. Windows and WSL, whose kernel's `release` names Microsoft, lack the feature.
    """
    supported = sys.platform != "win32" and "microsoft" not in release.lower()
    if supported and not any(name in environment for name in _ALLOCATOR):
        environment[_ALLOCATOR[0]] = "expandable_segments:True"


def _is_true(value: str) -> bool:
    return value.lower() in ("1", "true", "yes", "y", "on", "t")


def gpu_asked_for(environment: Mapping[str, str]) -> str | None:
    """Return the variable that asks for a GPU, as NAME=value; None without one."""
    device = environment.get("ACCELERATE_TORCH_DEVICE", "")
    if device.startswith("cuda"):
        return f"ACCELERATE_TORCH_DEVICE={device}"
    if uses_cpu(environment):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return f"CUDA_VISIBLE_DEVICES={visible}" if re.match(r"\d|GPU-|MIG-", visible) else None


def uses_cpu(environment: Mapping[str, str]) -> bool:
    """Return whether accelerate is told to use the CPU, also where there is a GPU."""
    return _is_true(environment.get("ACCELERATE_USE_CPU", ""))


def no_gpu(asked: str) -> str:
    """Return the problem of a variable, NAME=value, that asks for a missing GPU."""
    doctor = command_line("sd3tune", "doctor")
    return f"{asked}: torch finds no such GPU here; unset it to use the CPU, or see what `{doctor}` says"
