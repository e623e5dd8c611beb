"""The recipe of an image: everything needed to draw it again, and nothing specific to this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sd3tune import __version__
from sd3tune.adapter.file import ADAPTER_FILE
from sd3tune.files import png_recipe
from sd3tune.files.regular import sha256_of
from sd3tune.files.tensors import tensors_sha256
from sd3tune.inference import image_request
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import MEMORY_PARAMETERS
from sd3tune.inference.parameters import Parameter
from sd3tune.inference.session import InferenceSession
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.load.components import load_scheduler
from sd3tune.runtime.device import dtype_name


@dataclass(frozen=True)
class Recipes:
    """The recipes of a session's images."""

    session: InferenceSession
    _known_images: dict[Path, str] = field(default_factory=dict)

    def recipe(self, request: ImageRequest) -> dict[str, Any]:
        """Return the recipe of an image. It names adapters by name and hash, never by path."""
        conditions = self.session.conditions
        model: dict[str, Any] = {
            "base": conditions.base.label,
            "base_revision": conditions.base.revision,
            "base_fingerprint": self._fingerprint,
            "max_sequence_length": conditions.t5_length,
            "encoders": list(conditions.encoders),
            "dtype": dtype_name(self.session.dtype),
            "loras": [{**self._named[number], "weight": weight} for number, weight in request.loras],
        }
        if self.session.embeddings:
            model["embeddings"] = [
                {"name": one.origin or one.path.name, "sha256": sha256_of(one.path)} for one in self.session.embeddings
            ]
        if encoders := self._adapted_encoders(request):
            model["lora_encoders"] = encoders
        always, optional = self._image_entries(request)
        batch = {"batch": self.session.batch} if self.session.batch > 1 else {}
        pooled = {"clip_l_pooled": "unprojected"} if self._ignores_projection else {}
        return {"sd3tune": __version__, **always, **model, **optional, **self._memory_entries(), **pooled, **batch}

    def text(self, request: ImageRequest) -> str:
        """Return the recipe as JSON, as it is written into a PNG."""
        return as_text(self.recipe(request))

    def _adapted_encoders(self, request: ImageRequest) -> list[str]:
        """Return the text encoders that the request's adapters change."""
        parts = {part for number, _ in request.loras for part in self.session.adapters[number].text_parts}
        return [name for name in self.session.conditions.encoders if ENCODER_PARTS[name][1] in parts]

    def _image_entries(self, request: ImageRequest) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the entries that every recipe has, and the optional ones."""
        always: dict[str, Any] = {}
        optional: dict[str, Any] = {}
        for name, parameter in image_request.PARAMETERS.items():
            value = getattr(request, name)
            if parameter.recipe is None or not _is_written(request, parameter):
                continue
            entries = optional if parameter.optional else always
            *outer, key = parameter.recipe.split(".")
            for part in outer:
                entries = entries.setdefault(part, {})
            entries[key] = self._own_shift if name == "shift" and value is None else self._as_json(value, parameter)
        return always, optional

    def _as_json(self, value: Any, parameter: Parameter) -> Any:
        if isinstance(value, Path):
            return {"name": value.name, "sha256": self._image_sha256(value)}
        if isinstance(value, tuple):
            return list(value)
        return float(value) if parameter.type is float else value

    def _memory_entries(self) -> dict[str, Any]:
        """Return the memory options that change the image."""
        options = {
            parameter.recipe: getattr(self.session.memory, name)
            for name, parameter in MEMORY_PARAMETERS.items()
            if parameter.recipe is not None
        }
        return {key: value for key, value in options.items() if value and value != "none"}

    def _image_sha256(self, path: Path) -> str:
        if path not in self._known_images:
            self._known_images[path] = sha256_of(path)
        return self._known_images[path]

    @cached_property
    def _fingerprint(self) -> str:
        return self.session.conditions.base.fingerprint("transformer")

    @cached_property
    def _ignores_projection(self) -> bool:
        return self.session.conditions.base.ignores_projection

    @cached_property
    def _own_shift(self) -> float | None:
        """The base's shift; None if it depends on the size."""
        settings = load_scheduler(self.session.conditions.base).config
        return None if settings.get("use_dynamic_shifting") else float(settings.shift)

    @cached_property
    def _named(self) -> list[dict[str, str]]:
        own = self.session.own
        return [
            {
                "name": adapter.origin or _name_of(adapter.path),
                "sha256": sha256_of(adapter.path),
                "tensors_sha256": tensors_sha256(adapter.path),
                **({"embedding": sha256_of(own[number].path)} if number in own else {}),
            }
            for number, adapter in enumerate(self.session.adapters)
        ]


def as_text(recipe: Mapping[str, Any]) -> str:
    return json.dumps(recipe, ensure_ascii=False)


def read_recipe(path: Path) -> dict[str, Any] | None:
    """Return the recipe in a picture; None for a file without one."""
    recipe = png_recipe.read_recipe(path)
    return recipe if isinstance(recipe, dict) else None


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """Return a text that is equal for two recipes of the same picture.

    It leaves out the version and the batch size, which do not change the picture. It also leaves out the digest of an
    adapter's tensors, which earlier versions did not write; the digest of the file remains.
    """
    entries = {name: recipe[name] for name in sorted(recipe.keys() - {"sd3tune", "batch"})}
    if isinstance(loras := entries.get("loras"), list):
        entries["loras"] = [
            {key: value for key, value in lora.items() if key != "tensors_sha256"} if isinstance(lora, dict) else lora
            for lora in loras
        ]
    return json.dumps(entries)


def _is_written(request: ImageRequest, parameter: Parameter) -> bool:
    if parameter.requires is not None:
        return getattr(request, parameter.requires) is not None
    return not parameter.optional or getattr(request, parameter.name) != parameter.default


def _name_of(adapter: Path) -> str:
    """Return a readable name without the path: the file's own, or its run's if the file has the standard name."""
    if adapter.name != ADAPTER_FILE:
        return adapter.stem
    folders = [part for part in adapter.resolve().parts[:-1] if part not in ("adapter", "adapter_raw", "checkpoints")]
    return folders[-1]
