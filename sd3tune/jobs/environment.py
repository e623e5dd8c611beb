"""What the environment asks of a process: its place among others, and a GPU. Nothing here imports torch."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sd3tune.invocation import command_line

_PLACE = ("WORLD_SIZE", "RANK", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")
_WAY_OUT = "a launcher sets it, or left it behind: unset it, and start several processes with --num-processes"


def launch_problems(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the variables by which a launcher tells a process its place; nothing when none is set.

    Half of them would otherwise be passed over, and a process that is one of two would train as if it were alone,
    or wait for the other forever.
    """
    given = {name: environment[name] for name in (*_PLACE, *_MEETING) if environment.get(name, "-1") not in ("", "-1")}
    odd = [name for name, value in given.items() if name != "MASTER_ADDR" and not value.isdecimal()]
    if odd:
        return [f"{name}={given[name]}: not a whole number; {_WAY_OUT}" for name in odd]
    ranks = {name: int(given[name]) for name in ("RANK", "LOCAL_RANK") if name in given}
    if "WORLD_SIZE" not in given:
        return [f"{name}={rank}: set without WORLD_SIZE; {_WAY_OUT}" for name, rank in ranks.items()]
    world = int(given["WORLD_SIZE"])
    if world == 0:
        return [f"WORLD_SIZE=0: at least 1; {_WAY_OUT}"]
    missing = [name for name in (*_PLACE, *_MEETING) if name not in given]
    if world > 1 and missing:
        return [f"WORLD_SIZE={world}: set without {', '.join(missing)}; {_WAY_OUT}"]
    return [
        f"{name}={rank}: at most {world - 1} with WORLD_SIZE={world}; {_WAY_OUT}"
        for name, rank in ranks.items()
        if rank >= world
    ]


def gpu_asked_for(environment: Mapping[str, str]) -> str | None:
    """The variable that asks for a GPU, as NAME=value; None when the CPU will do."""
    device = environment.get("ACCELERATE_TORCH_DEVICE", "")
    if device.startswith("cuda"):
        return f"ACCELERATE_TORCH_DEVICE={device}"
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "on", "t"):
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "")
    return f"CUDA_VISIBLE_DEVICES={visible}" if re.match(r"\d|GPU-|MIG-", visible) else None


def no_gpu(asked: str) -> str:
    doctor = command_line("sd3tune", "doctor")
    return f"{asked}: torch finds no such GPU here; unset it to use the CPU, or see what `{doctor}` says"
