"""The recipe in each picture: what is needed to draw it again, and nothing that only this machine knows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sd3tune import __version__
from sd3tune.adapter.file import ADAPTER_FILE
from sd3tune.files.regular import sha256_of
from sd3tune.files.tensors import tensors_sha256
from sd3tune.inference.image_request import Shot
from sd3tune.inference.session import Studio
from sd3tune.model.load.components import load_scheduler
from sd3tune.publish.previews import written_in
from sd3tune.runtime.device import dtype_name


@dataclass(frozen=True)
class Recipes:
    """Writes the recipes of a call's shots."""

    studio: Studio
    _known_images: dict[Path, str] = field(default_factory=dict)

    def of(self, shot: Shot) -> dict[str, Any]:
        """Adapters by name and hash, never by path."""
        conditions = self.studio.conditions
        recipe = {
            "sd3tune": __version__,
            "prompt": shot.prompt,
            "negative": shot.negative,
            "seed": shot.seed,
            "steps": shot.steps,
            "guidance": float(shot.guidance),
            "size": list(shot.size or ()),
            "sampler": shot.sampler,
            "shift": self._own_shift if shot.shift is None else shot.shift,
            "base": conditions.base.label,
            "base_revision": conditions.base.revision,
            "base_fingerprint": self._fingerprint,
            "max_sequence_length": conditions.t5_length,
            "encoders": list(conditions.encoders),
            "dtype": dtype_name(self.studio.dtype),
            "loras": [{**self._named[number], "weight": weight} for number, weight in shot.loras],
        }
        batch = {"batch": self.studio.batch} if self.studio.batch > 1 else {}
        pooled = {"clip_l_pooled": "unprojected"} if self._ignores_projection else {}
        return recipe | self._optional_fields(shot) | self._held() | pooled | batch

    def _optional_fields(self, shot: Shot) -> dict[str, Any]:
        """Return the fields that most pictures do not have."""
        texts = {name: getattr(shot, name) for name in ("prompt_clip_l", "prompt_clip_g", "prompt_t5")}
        found: dict[str, Any] = {name: text for name, text in texts.items() if text is not None}
        if shot.noise_offset:
            found["noise_offset"] = float(shot.noise_offset)
        if shot.slg is not None:
            found["slg"] = {
                "scale": shot.slg, "layers": list(shot.slg_layers), "start": shot.slg_start, "stop": shot.slg_stop,
            }  # fmt: skip
        if shot.image is not None:
            found["image"] = {"name": shot.image.name, "sha256": self._image_sha256(shot.image)}
            found["strength"] = float(shot.strength)
        return found

    def _held(self) -> dict[str, Any]:
        """Of how the base is held, what changes the picture."""
        held = {name: getattr(self.studio.memory, name) for name in ("quantize", "t5_8bit", "vae_tiling")}
        return {name: value for name, value in held.items() if value and value != "none"}

    def _image_sha256(self, path: Path) -> str:
        if path not in self._known_images:
            self._known_images[path] = sha256_of(path)
        return self._known_images[path]

    @cached_property
    def _fingerprint(self) -> str:
        return self.studio.conditions.base.fingerprint("transformer")

    @cached_property
    def _ignores_projection(self) -> bool:
        return self.studio.conditions.base.ignores_projection

    @cached_property
    def _own_shift(self) -> float | None:
        """The base's; None where it depends on the size."""
        settings = load_scheduler(self.studio.conditions.base).config
        return None if settings.get("use_dynamic_shifting") else float(settings.shift)

    @cached_property
    def _named(self) -> list[dict[str, str]]:
        return [
            {
                "name": adapter.origin or _name_of(adapter.path),
                "sha256": sha256_of(adapter.path),
                "tensors_sha256": tensors_sha256(adapter.path),
            }
            for adapter in self.studio.adapters
        ]


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe in a picture; None for a file without one, or with one that no picture needs to be so long or deep."""
    recipe = written_in(path)
    return recipe if isinstance(recipe, dict) else None


def recipe_key(recipe: Mapping[str, Any]) -> str:
    """The same for two recipes of one picture: the version, and what was drawn beside it, make no other one.

    Nor does the digest of an adapter's tensors, which earlier versions did not write, as that of its file is there.
    """
    found = {name: recipe[name] for name in sorted(recipe.keys() - {"sd3tune", "batch"})}
    if isinstance(loras := found.get("loras"), list):
        found["loras"] = [
            {key: one for key, one in lora.items() if key != "tensors_sha256"} if isinstance(lora, dict) else lora
            for lora in loras
        ]
    return json.dumps(found)


def _name_of(adapter: Path) -> str:
    """A name for people: the file's own, or else that of its run; never the path."""
    if adapter.name != ADAPTER_FILE:
        return adapter.stem
    folders = [part for part in adapter.resolve().parts[:-1] if part not in ("adapter", "adapter_raw", "checkpoints")]
    return folders[-1]
