"""Checkpoints: tensors in safetensors, the rest in JSON, the folder renamed into place. Nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.atomic import new_folder, remove_folder, write_json
from sd3tune.errors import RunError
from sd3tune.train.step import TrainState

_TENSORS, _STATE = "state.safetensors", "state.json"
_OPTIMIZER = "optimizer."


def save_checkpoint(
    run: Path, state: TrainState, identity: Mapping[str, Any], keep: int | None, export: Callable[[Path], object]
) -> Path:
    """Write `run/checkpoints/step-000500`, then remove all but the newest `keep`, if that is a number.

    `identity` is what a resumed run must agree with (see `differences`); `export(folder)` adds what `infer` can use.
    """
    folder = checkpoint_at(run, state.step)
    with new_folder(folder) as temporary:
        save_file(_tensors(state), temporary / _TENSORS)
        layout = {name: list(shape) for name, shape in state.master.shapes.items()}
        write_json(temporary / _STATE, {"step": state.step, "identity": identity, "layout": layout})
        export(temporary)
    prune(run, keep)
    return folder


def checkpoint_at(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return run / "checkpoints" / f"step-{step:06d}"


def prune(run: Path, keep: int | None) -> None:
    """Remove all checkpoints but the newest `keep`, if that is a number."""
    for old in list_checkpoints(run)[: -keep if keep else 0]:
        remove_folder(old)


def list_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The JSON half: `step`, `identity`, `layout`. Raises RunError."""
    try:
        state: dict[str, Any] = json.loads((checkpoint / _STATE).read_text(encoding="utf-8"))
        return state
    except (OSError, ValueError) as error:
        raise RunError(f"{checkpoint}: damaged ({error}); delete this folder to resume from the one before") from error


def restore(checkpoint: Path, state: TrainState) -> None:
    """Put a checkpoint's tensors into `state`, which has the same layout. Raises RunError."""
    saved = read_state(checkpoint)
    layout = {name: list(shape) for name, shape in state.master.shapes.items()}
    if saved["layout"] != layout:
        raise RunError(f"{checkpoint}: holds other trained tensors than this configuration makes")
    device = str(state.master.master.device)
    try:
        tensors = load_file(checkpoint / _TENSORS, device=device)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{checkpoint}: damaged ({error}); delete this folder to resume from the one before") from error
    with torch.no_grad():
        for name, live in _fixed_tensors(state).items():
            live.copy_(tensors.pop(name))
    # Clones: a tensor that shares memory with the file's mapping must not be updated in place.
    state.optimizer.state[state.master.master] = {
        name.removeprefix(_OPTIMIZER): tensor.clone() for name, tensor in tensors.items()
    }
    state.step = saved["step"]
    state.master.publish()


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two nested mappings differ, as `train.batch_size: 1 in the run, 2 now`."""
    lines = []
    for key in dict.fromkeys([*saved, *now]):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {json.dumps(old)} in the run, {json.dumps(new)} now")
    return lines


def _fixed_tensors(state: TrainState) -> dict[str, Tensor]:
    tensors = {"master": state.master.master.detach()}
    if state.ema is not None:
        tensors["ema"] = state.ema
    if state.loss_scale.enabled:
        tensors |= {"loss_scale": state.loss_scale.scale, "good_steps": state.loss_scale.good_steps}
    return tensors


def _tensors(state: TrainState) -> dict[str, Tensor]:
    optimizer = state.optimizer.state[state.master.master]
    return _fixed_tensors(state) | {f"{_OPTIMIZER}{name}": tensor for name, tensor in optimizer.items()}
