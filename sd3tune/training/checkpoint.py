"""Checkpoints: tensors in safetensors, the rest in JSON, the folder renamed into place. Nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
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
from sd3tune.training.optimizers import HostStepped
from sd3tune.training.step import TrainState

_TENSORS, _STATE = "state.safetensors", "state.json"
_OPTIMIZER = "optimizer."
_MOST_BYTES = 64 * 2**20
"""Limit of the JSON file, which names every trained tensor several times."""


def save_checkpoint(
    run: Path, state: TrainState, identity: Mapping[str, Any], keep: int | None, export: Callable[[Path], object]
) -> Path:
    """Write `run/checkpoints/step-000500`, then remove all but the newest `keep`, if that is a number.

    A resumed run must match `identity` (see `differences`). `export(folder)` adds the files that `infer` reads.
    """
    folder = checkpoint_at(run, state.step)
    with new_folder(folder) as temporary:
        tensors = _tensors(state)
        save_sorted(temporary / _TENSORS, tensors)
        digests = {name: digest(tensor) for name, tensor in tensors.items()}
        described = {"step": state.step, "identity": identity, "layout": _layout(state), "digests": digests}
        if isinstance(state.optimizer, HostStepped):
            described["optimizer"] = state.optimizer.numbers()
        write_json(temporary / _STATE, described)
        export(temporary)
    prune(run, keep)
    return folder


def checkpoint_at(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint, whether it exists or not."""
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
    """The JSON half: `step`, `identity`, `layout` and, but for old checkpoints, `digests`. Raises RunError."""
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
    """Put a checkpoint's tensors into `state`, which has the same layout; all are checked before one is used.

    Raises RunError for one that is missing, of another shape or dtype, not finite, or not as it was written.
    """
    saved = read_state(checkpoint)
    if saved["layout"] != _layout(state):
        raise RunError(f"{checkpoint}: holds other trained tensors than this configuration makes")
    try:
        tensors = load_file(checkpoint / _TENSORS, device="cpu")
    except (OSError, SafetensorError) as error:
        raise _damaged(checkpoint, str(error)) from error
    expected, optimizer = _tensors(state), state.optimizer
    if isinstance(optimizer, HostStepped):  # what it remembers is known once it has stepped, and so from the file
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith(_OPTIMIZER)}
        expected |= {name: tensor for name, tensor in tensors.items() if name.startswith(_OPTIMIZER)}
        _check_numbers(checkpoint, saved.get("optimizer"))
    for name in sorted({*expected, *tensors}):
        found, live = tensors.get(name), expected.get(name)
        if found is None or live is None:
            raise _damaged(checkpoint, f"{name}: {'missing' if found is None else 'not a tensor of this run'}")
        if (found.shape, found.dtype) != (live.shape, live.dtype):
            raise _damaged(checkpoint, f"{name}: {_form(found)}, not {_form(live)}")
        if saved["digests"].get(name, "") not in ("", digest(found)):
            raise _damaged(checkpoint, f"{name}: not the bytes that were written")
        if not found.isfinite().all():
            raise _damaged(checkpoint, f"{name}: holds values that are not finite")
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    if isinstance(optimizer, HostStepped):
        own = {name.removeprefix(_OPTIMIZER): of for name, of in expected.items() if name.startswith(_OPTIMIZER)}
        optimizer.remember(own, saved["optimizer"])
    state.step = saved["step"]
    state.master.publish()


def _check_numbers(checkpoint: Path, numbers: Any) -> None:
    """RunError unless it is what `HostStepped.numbers` gives."""
    forms = {"state": dict, "group": dict, "on_the_host": list}
    if not isinstance(numbers, dict) or any(type(numbers.get(name)) is not form for name, form in forms.items()):
        raise _damaged(checkpoint, f"{_STATE} has no numbers of the optimizer")


def _damaged(checkpoint: Path, reason: str) -> RunError:
    return RunError(f"{checkpoint}: damaged ({reason}); delete this folder to resume from the one before")


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _layout(state: TrainState) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in state.master.shapes.items()}


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


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """The live tensors that a checkpoint holds, by their names in it."""
    tensors = {"master": state.master.master.detach()}
    if state.ema is not None:
        tensors["ema"] = state.ema
    if state.loss_scale.enabled:
        tensors |= {"loss_scale": state.loss_scale.scale, "good_steps": state.loss_scale.good_steps}
    optimizer = state.optimizer.state[state.master.master]
    remembered = {name: value for name, value in optimizer.items() if isinstance(value, Tensor)}
    return tensors | {f"{_OPTIMIZER}{name}": tensor for name, tensor in remembered.items()}
