"""The recipe in each picture: what is needed to draw it again, and nothing that only this machine knows."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from sd3tune import __version__
from sd3tune.jobs.conditions import Conditions
from sd3tune.jobs.machine import dtype_name
from sd3tune.jobs.shots import Shot
from sd3tune.model.adapter_io import ADAPTER_FILE, Adapter

RECIPE_KEY = "sd3tune"
"""The text chunk of a PNG that holds its recipe, as JSON."""


@dataclass(frozen=True)
class Recipes:
    """Writes the recipes of a call's shots."""

    conditions: Conditions
    adapters: Sequence[Adapter]
    dtype: torch.dtype

    def of(self, shot: Shot) -> dict[str, Any]:
        """Adapters by name and hash, never by path."""
        conditions = self.conditions
        return {
            "sd3tune": __version__,
            "prompt": shot.prompt,
            "negative": shot.negative,
            "seed": shot.seed,
            "steps": shot.steps,
            "guidance": shot.guidance,
            "size": list(shot.size or ()),
            "base": conditions.base.label,
            "base_revision": conditions.base.revision,
            "max_sequence_length": conditions.t5_length,
            "encoders": list(conditions.encoders),
            "dtype": dtype_name(self.dtype),
            "loras": [{**self._named[number], "weight": weight} for number, weight in shot.loras],
        }

    @cached_property
    def _named(self) -> list[dict[str, str]]:
        return [
            {"name": adapter.origin or _name_of(adapter.path), "sha256": file_sha256(adapter.path)}
            for adapter in self.adapters
        ]


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _name_of(adapter: Path) -> str:
    """A name for people: the file's own, or else that of its run; never the path."""
    if adapter.name != ADAPTER_FILE:
        return adapter.stem
    folders = [part for part in adapter.resolve().parts[:-1] if part not in ("adapter", "adapter_raw", "checkpoints")]
    return folders[-1]
