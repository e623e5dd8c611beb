"""A whole trained model as a folder in diffusers' layout, which every program based on diffusers can load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.errors import ModelError, RunError
from sd3tune.files.atomic import new_folder
from sd3tune.model.base.base import Base
from sd3tune.model.base.contract import CONTRACT_FILE, CONTRACT_VERSION
from sd3tune.model.base.parts import INDEX_FILE, MODEL_INDEX
from sd3tune.model.base.weights import read_json, tensor_headers, weight_files

_T5 = ("text_encoder_3", "tokenizer_3")


def check_parts(base: Base, asked_by: str = "method.kind=full") -> None:
    """Raise ModelError for a base whose other parts cannot be copied into a model folder."""
    if base.kind == "file" or base.encoder_files:
        obstacle = (
            "a single file" if base.kind == "file" else "text encoders from files of their own (model.text_encoders)"
        )
        raise ModelError(
            f"{base.name}: {asked_by} writes a whole model in diffusers' layout, and {obstacle} cannot be copied "
            "into one; give a base that is such a folder or a Hub id"
        )


def write_model(
    folder: Path,
    base: Base,
    tensors: Mapping[str, Tensor],
    contract: Mapping[str, Any],
    shift: float | None,
    text: Mapping[str, Mapping[str, Tensor]] = {},
) -> Path:
    """Write a model folder: a transformer of these `tensors`, the base's other parts, and the contract.

    The other parts are hard links to the base's files if the file system supports them, otherwise copies; `text` is
    folder of a text encoder -> key in its files -> another weight, of the same shape and dtype. If the contract has no
    T5, it is left out, and must also be left out in loading (`text_encoder_3=None, tokenizer_3=None`). `shift` is the
    scheduler's, None for the base's own. Returns `model_index.json`. Raises RunError, before anything is written, if a
    tensor is not finite.
    """
    bad = [name for name, value in tensors.items() if (~value.isfinite()).any()]
    if bad:
        dtype = str(tensors[bad[0]].dtype).removeprefix("torch.")
        raise RunError(
            f"{folder}: not written: {len(bad)} tensors are NaN or infinite as {dtype}, first {bad[0]}; "
            "method.export_dtype=bf16 has a wider range"
        )
    left_out = () if "t5" in contract["encoders"] else _T5
    with new_folder(folder) as temporary:
        for part in MODEL_INDEX:
            if part not in ("_class_name", "transformer", "scheduler", *left_out):
                _write_part(base.folder(part), temporary / part, text.get(part, {}))
        _write_scheduler(base.folder("scheduler"), temporary / "scheduler", shift)
        _write_transformer(temporary / "transformer", base.config("transformer"), tensors)
        _write_json(temporary / CONTRACT_FILE, dict(sorted({"contract_version": CONTRACT_VERSION, **contract}.items())))
        _write_json(temporary / INDEX_FILE, {**MODEL_INDEX, **{part: [None, None] for part in left_out}})
    return folder / INDEX_FILE


def _write_part(source: Path, target: Path, changed: Mapping[str, Tensor]) -> None:
    """Write a part with these weights changed; without any, its files. Variants would have the former weights."""
    if not changed:
        _link_files(source, target)
        return
    target.mkdir()
    for file in sorted(source.glob("*.json")):
        if ".index." not in file.name or file.name.endswith(".safetensors.index.json"):
            _link(file.resolve(), target / file.name)
    for file in weight_files(source):
        if changed.keys() & tensor_headers(file).keys():
            tensors = load_file(file)
            tensors |= {name: tensor.contiguous() for name, tensor in changed.items() if name in tensors}
            save_file(tensors, target / file.name, metadata={"format": "pt"})
        else:
            _link(file.resolve(), target / file.name)


def _link_files(source: Path, target: Path) -> None:
    """Hard-link or copy the files of a part; files in the Hub's cache are symbolic links, which are resolved."""
    target.mkdir()
    for file in sorted(source.iterdir()):
        if file.is_file():
            _link(file.resolve(), target / file.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _write_scheduler(source: Path, target: Path, shift: float | None) -> None:
    if shift is None:
        _link_files(source, target)
        return
    target.mkdir()
    config = read_json(source / "scheduler_config.json")
    _write_json(target / "scheduler_config.json", {**config, "shift": shift})


def _write_transformer(target: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    target.mkdir()
    own = {key: value for key, value in config.items() if not key.startswith("_")}
    head = {"_class_name": "SD3Transformer2DModel", "_diffusers_version": diffusers_version}
    _write_json(target / "config.json", {**head, **own})
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(on_cpu, target / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
