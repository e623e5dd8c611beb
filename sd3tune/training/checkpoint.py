"""Checkpoints: tensors in safetensors, everything else in JSON, written atomically. Nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sd3tune.errors import RunError
from sd3tune.files.atomic import new_folder, remove_folder, write_json
from sd3tune.files.json import NotJson, read_object
from sd3tune.files.tensors import digest, save_sorted
from sd3tune.runtime.processes import Processes
from sd3tune.training.host_stepped import HostStepped
from sd3tune.training.optimizers import state_tensors
from sd3tune.training.sharded_checkpoint import DamagedShards, read_shards, write_shards
from sd3tune.training.step import TrainState

_TENSORS, _STATE = "state.safetensors", "state.json"
_FILES = "files"
"""Key of the JSON file, of a sharded checkpoint only: file -> SHA-256."""
_OPTIMIZER = "optimizer."
_MOST_BYTES = 64 * 2**20
"""Size limit of the JSON file, which names every trained tensor several times."""


def save_checkpoint(
    run: Path, state: TrainState, identity: Mapping[str, Any], keep: int | None, export: Callable[[Path], object]
) -> Path:
    """Write `run/checkpoints/step-000500`, then remove all but the newest `keep` checkpoints; None keeps all.

    A resumed run must match `identity` (see `differences`). `export(folder)` adds the files that `infer` reads.
    """
    folder = checkpoint_at(run, state.step)
    with new_folder(folder) as temporary:
        tensors = _tensors(state)
        save_sorted(temporary / _TENSORS, tensors)
        digests = {name: digest(tensor) for name, tensor in tensors.items()}
        described = {**_described(state, identity), "digests": digests}
        if isinstance(state.optimizer, HostStepped):
            described["optimizer"] = state.optimizer.numbers()
        write_json(temporary / _STATE, described)
        export(temporary)
    prune(run, keep)
    return folder


def save_sharded_checkpoint(
    run: Path,
    state: TrainState,
    identity: Mapping[str, Any],
    keep: int | None,
    export: Callable[[Path], object],
    processes: Processes,
) -> None:
    """Do as `save_checkpoint`, on every process; each writes its rows of the tensors, into a folder that all see."""
    with new_folder(checkpoint_at(run, state.step)) if processes.is_main else nullcontext() as made:
        temporary = Path(processes.exchange(str(made))[0])
        written = processes.exchange(write_shards(temporary, state.master, _tensors(state)))
        if processes.is_main:
            files = {name: digest for of_rank in written for name, digest in of_rank.items()}
            write_json(temporary / _STATE, {**_described(state, identity), _FILES: files})
        export(temporary)
    if processes.is_main:
        prune(run, keep)


def _described(state: TrainState, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {"step": state.step, "identity": identity, "layout": _layout(state)}


def checkpoint_at(run: Path, step: int) -> Path:
    """Return the folder for the checkpoint of a step; it may not exist."""
    return run / "checkpoints" / f"step-{step:06d}"


def prune(run: Path, keep: int | None) -> None:
    """Remove all checkpoints but the newest `keep`; None keeps all."""
    for old in list_checkpoints(run)[: -keep if keep else 0]:
        remove_folder(old)


def list_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("step-")))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the JSON part: `step`, `identity`, `layout` and `digests`, empty in old checkpoints. Raises RunError."""
    try:
        fields = read_object(checkpoint / _STATE, _MOST_BYTES)
    except (OSError, NotJson) as error:
        raise _damaged(checkpoint, f"{_STATE}: {error}") from error
    for name, kind in {"step": int, "identity": dict, "layout": dict}.items():
        if not isinstance(fields.get(name), kind):
            raise _damaged(checkpoint, f"{_STATE} has no {name}")
    if isinstance(fields["step"], bool) or fields["step"] < 0:
        raise _damaged(checkpoint, f"{_STATE}: step is no number of steps")
    if not isinstance(fields.setdefault("digests", {}), dict):
        raise _damaged(checkpoint, f"{_STATE}: digests is not an object")
    return fields


def restore(checkpoint: Path, state: TrainState) -> None:
    """Load a checkpoint into `state`, which must have the same layout. All tensors are checked before any is loaded.

    Raises RunError for a tensor that is missing, of another shape or dtype, not finite, or changed since written.
    """
    saved = read_state(checkpoint)
    if saved["layout"] != _layout(state):
        raise RunError(f"{checkpoint}: holds other trained tensors than this configuration makes")
    if _FILES in saved:
        _restore_shards(checkpoint, state, saved[_FILES])
        state.step = saved["step"]
        state.master.publish()
        return
    try:
        tensors = load_file(checkpoint / _TENSORS, device="cpu")
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, str(error)) from error
    expected, optimizer = _tensors(state), state.optimizer
    if isinstance(optimizer, HostStepped):  # its state exists only after a step, so the file defines it
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith(_OPTIMIZER)}
        expected |= {name: tensor for name, tensor in tensors.items() if name.startswith(_OPTIMIZER)}
        _check_numbers(checkpoint, saved.get("optimizer"), optimizer, tensors)
    whole = torch.Size([sum(shape.numel() for shape in state.master.whole_shapes.values())])
    for name in sorted({*expected, *tensors}):
        stored, live = tensors.get(name), expected.get(name)
        if stored is None or live is None:
            raise _damaged(checkpoint, f"{name}: {'missing' if stored is None else 'not a tensor of this run'}")
        is_divided = state.master.is_sharded and live.shape == state.master.master.shape
        shape = whole if is_divided else live.shape
        if (stored.shape, stored.dtype) != (shape, live.dtype):
            raise _damaged(checkpoint, f"{name}: {_form(stored.dtype, stored.shape)}, not {_form(live.dtype, shape)}")
        if saved["digests"].get(name, "") not in ("", digest(stored)):
            raise _damaged(checkpoint, f"{name}: not the bytes that were written")
        if is_divided:
            stored = tensors[name] = state.master.own_part(stored)
        if not stored.isfinite().all():
            raise _damaged(checkpoint, f"{name}: holds values that are not finite")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    if isinstance(optimizer, HostStepped):
        optimizer_tensors = {
            name.removeprefix(_OPTIMIZER): value for name, value in expected.items() if name.startswith(_OPTIMIZER)
        }
        optimizer.remember(optimizer_tensors, saved["optimizer"])
    state.step = saved["step"]
    state.master.publish()


def _restore_shards(checkpoint: Path, state: TrainState, digests: Any) -> None:
    """Load the tensors of `save_sharded_checkpoint` into a state, whether it is divided or not."""
    if not isinstance(digests, dict) or isinstance(state.optimizer, HostStepped):
        raise _damaged(checkpoint, f"{_STATE}: {_FILES} is not what this configuration writes")
    tensors = _tensors(state)
    try:
        read_shards(checkpoint, state.master, tensors, digests)
    except DamagedShards as error:
        raise _damaged(checkpoint, str(error)) from error
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise _damaged(checkpoint, f"{name}: holds values that are not finite")


def _check_numbers(checkpoint: Path, numbers: Any, optimizer: HostStepped, tensors: Mapping[str, Tensor]) -> None:
    """Raise RunError unless `numbers` has the form that `HostStepped.numbers` returns, and all names are known."""
    forms = {"state": dict, "group": dict, "on_the_host": list}
    if not isinstance(numbers, dict) or any(type(numbers.get(name)) is not form for name, form in forms.items()):
        raise _damaged(checkpoint, f"{_STATE} has no numbers of the optimizer")
    names = [name.removeprefix(_OPTIMIZER) for name in tensors if name.startswith(_OPTIMIZER)]
    for name in (*names, *numbers["state"]):
        if not optimizer.knows(name):
            raise _damaged(checkpoint, f"{_OPTIMIZER}{name}: not a value of this run")


def _damaged(checkpoint: Path, reason: str) -> RunError:
    return RunError(f"{checkpoint}: damaged ({reason}); delete this folder to resume from the one before")


def _form(dtype: torch.dtype, shape: torch.Size) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _layout(state: TrainState) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in state.master.whole_shapes.items()}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return the keys in which two nested mappings differ, as `train.batch_size: 1 in the run, 2 now`."""
    lines = []
    for key in dict.fromkeys([*saved, *now]):
        old, new = saved.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key}: {json.dumps(old)} in the run, {json.dumps(new)} now")
    return lines


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """Return the tensors to checkpoint, by their names in the file; not copies."""
    tensors = {"master": state.master.master.detach()}
    if state.ema is not None:
        tensors["ema"] = state.ema
    if state.loss_scale.enabled:
        tensors |= {"loss_scale": state.loss_scale.scale, "good_steps": state.loss_scale.good_steps}
    if state.drift is not None:
        tensors["prior_weight"] = state.drift.factor
    remembered = state_tensors(state.optimizer, state.master.master)
    return tensors | {f"{_OPTIMIZER}{name}": tensor for name, tensor in remembered.items()}
