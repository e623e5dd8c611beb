"""Locate a base model: an offline base, a folder in diffusers' layout, a Hub id, or a single file.

Nothing here imports torch, so that a misspelt or gated base is reported at once.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from sd3tune.config.sections.model import ModelConfig
from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base, RandomTransformer
from sd3tune.model.base.contract import CONTRACT_FILE
from sd3tune.model.base.hub import cached, download
from sd3tune.model.base.offline import offline_folder, offline_kind
from sd3tune.model.base.parts import COMMON, CONFIGS, VARIANTS
from sd3tune.model.base.shape import new_shape
from sd3tune.model.base.single_file_header import read_checkpoint
from sd3tune.model.base.suggestions import suggest_released, suggestion
from sd3tune.model.base.weights import PICKLED, read_json


@dataclass(frozen=True)
class _ReleasedShape(Base):
    """A released model from its bundled configurations: no weights, no tokenizers, no download."""

    def folder(self, part: str, weights: bool = True) -> Path:
        return (self.path if part == "transformer" else COMMON) / part


def shape_of_base(model: ModelConfig, seed: int = 0) -> Base:
    """Return the configured base for its shapes alone, without downloading a released model.

    For any other base it reads the same files as `configured_base`, and raises the same ModelError.
    """
    variant = next((name for name, repository in VARIANTS.items() if repository == model.base), None)
    if variant is None or Path(model.base).exists():
        return configured_base(model, seed)
    files = model.text_encoders.model_dump(exclude_none=True) if model.text_encoders else {}
    paths = {encoder: Path(file).expanduser() for encoder, file in files.items()}
    base = _ReleasedShape(model.base, "folder", CONFIGS / variant, None, paths)
    if model.init == "pretrained":
        return base
    return replace(base, random=RandomTransformer(new_shape(base, model.transformer), seed))


def configured_base(model: ModelConfig, seed: int = 0) -> Base:
    """Return the base of the `model` section, with all of its keys applied; `seed` is for random weights."""
    files = model.text_encoders.model_dump(exclude_none=True) if model.text_encoders else {}
    base = resolve_base(model.base, model.revision, files, model.tokenizers)
    if model.init == "pretrained":
        return base
    return replace(base, random=RandomTransformer(new_shape(base, model.transformer), seed))


def resolve_base(
    name: str,
    revision: str | None = None,
    encoder_files: Mapping[str, str] | None = None,
    tokenizers: str | None = None,
) -> Base:
    """Return a base: an offline one (built on first use if tiny), an existing folder or single file, or a Hub id.

    `revision` is a branch, tag or commit of a Hub base; other kinds have none. See `Base` for the other parameters.
    Raises ModelError.
    """
    files = {encoder: Path(file).expanduser() for encoder, file in (encoder_files or {}).items()}
    kind = offline_kind(name)
    if kind is not None:
        return Base(name, kind, offline_folder(name), None, files, tokenizers)
    path = Path(name).expanduser()
    if path.is_dir():
        _check_model_index(path, name)
        return Base(name, "folder", path.resolve(), None, files, tokenizers)
    if path.is_file() or path.suffix.lower() in (".safetensors", *PICKLED):
        read_checkpoint(path)
        return Base(name, "file", path.absolute(), None, files, tokenizers)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ModelError(f"{name}: no such base: neither an offline base, a path nor a Hub id{suggestion(path)}")
    with suggest_released(name):
        snapshot = download(name, revision, ["model_index.json", CONTRACT_FILE])
    _check_model_index(snapshot, name)
    return Base(name, "hub", snapshot, snapshot.name, files, tokenizers)


def local_base(model: ModelConfig) -> Base | None:
    """Return the configured base if it is on this machine, else None; a Hub base must be in the cache.

    A single file also needs local tokenizers. Raises ModelError for any other folder or file.
    """
    if offline_kind(model.base) is not None or Path(model.base).expanduser().exists():
        base = configured_base(model)
        has_tokenizers = base.kind != "file" or (model.tokenizers is not None and Path(model.tokenizers).is_dir())
        return base if has_tokenizers else None
    snapshot = cached(model.base, model.revision)
    return None if snapshot is None else Base(model.base, "folder", snapshot)


def _check_model_index(folder: Path, name: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        inside = folder / "model"  # a run that trained the whole model has one
        hint = f"; did you mean {str(inside)!r}?" if (inside / "model_index.json").is_file() else ""
        raise ModelError(f"{name}: no model_index.json, so this is no model folder in diffusers' layout{hint}")
    pipeline = str(read_json(index).get("_class_name"))
    if not pipeline.startswith("StableDiffusion3"):
        raise ModelError(f"{name}: a {pipeline}, not a Stable Diffusion 3 or 3.5 model")
