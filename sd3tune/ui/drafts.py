"""Configurations in the making: YAML files in the first opened folder, checked as `sd3tune config check` does."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config.edit import Raw, with_value
from sd3tune.config.extends import KEY, PRESET
from sd3tune.config.files import read_text
from sd3tune.config.from_preset import UserValues, text_from_preset
from sd3tune.config.loader import load_text
from sd3tune.config.presets import Preset, find_preset
from sd3tune.config.schema import Config
from sd3tune.config.shape import paths_in, value_at
from sd3tune.config.yaml12 import KeyPath, YamlError, parse
from sd3tune.errors import ConfigError, UserError
from sd3tune.files.atomic import write_text
from sd3tune.invocation import command_line
from sd3tune.ui.workspace import Workspace, plain_name

_SMALL_BASE: dict[KeyPath, Any] = {
    ("model", "quantize"): "none",
    ("model", "dtype"): "auto",
    ("model", "max_sequence_length"): 16,
    ("data", "resolution"): 64,
    ("train", "gradient_checkpointing"): "none",
    ("train", "memory"): None,
    ("train", "steps"): 250,
    ("train", "batch_size"): 4,
    ("optimizer",): {"kind": "adamw", "lr": 1e-3},
    ("schedule",): {"kind": "constant", "warmup_steps": 0},
    ("checkpoint", "every"): 50,
    ("preview", "every"): 50,
    ("preview", "steps"): 10,
}
"""What differs for the bases of a few megabytes, whose pictures have 64 pixels."""
BASES: dict[str, tuple[str, dict[KeyPath, Any]]] = {
    "": ("as in the preset", {}),
    "nano": ("nano: small and real, draws shapes of 64 pixels; minutes on any computer", _SMALL_BASE),
    "tiny": (
        "tiny: random weights, only to see that everything works; seconds",
        {**_SMALL_BASE, ("train", "steps"): 20},
    ),
    "stabilityai/stable-diffusion-3.5-medium": ("Stable Diffusion 3.5 medium", {}),
    "stabilityai/stable-diffusion-3.5-large": ("Stable Diffusion 3.5 large", {}),
    "stabilityai/stable-diffusion-3-medium-diffusers": ("Stable Diffusion 3 medium", {}),
}
"""Base -> how the page names it, and the keys to write with it."""
_LINE = re.compile(r"(?P<file>.*?):(?P<line>\d+): (?:(?P<key>[a-z_0-9]+(?:\.[a-z_0-9]+)*): )?(?P<text>.*)", re.DOTALL)


@dataclass(frozen=True)
class Draft:
    """A YAML file of the first opened folder."""

    workspace: Workspace
    file: Path

    @classmethod
    def of(cls, workspace: Workspace, name: str) -> Draft:
        """Return the draft of a file name. Raises Outside for one with folders, ConfigError if it is no YAML's."""
        if not plain_name(name).endswith((".yaml", ".yml")):
            raise ConfigError(f"{name}: not a configuration; its name ends with .yaml")
        return cls(workspace, workspace.path(name))

    def text(self) -> str:
        return read_text(str(self.file))

    def save(self, text: str, former: str) -> str:
        """Write the text, and return its digest.

        Raises ConfigError for a text with problems, and if the file is no longer the one of `former`.
        """
        if problems := self.check(text)["problems"]:
            raise ConfigError(*(one["text"] for one in problems))
        if digest(self.text()) != former:
            raise ConfigError(f"{self.file.name}: was changed meanwhile, by another page or program; reload the page")
        write_text(self.file, text)
        return digest(text)

    def check(self, text: str) -> dict[str, Any]:
        """Return the problems with their lines, the values and the notes."""
        name = self.workspace.shown(self.file)
        try:
            _check_extended(self.workspace, text)
            loaded = load_text(text, str(self.file))
        except UserError as error:
            return {"problems": [_placed(line, self.file) for line in error.problems], "notes": [], "values": None}
        problems = [{"line": None, "key": None, "text": line} for line in outside(self.workspace, loaded.config)]
        return {
            "problems": problems,
            "notes": loaded.notes,
            "values": loaded.config.model_dump(mode="json"),
            "photos": self.workspace.shown(Path(loaded.config.data.sources[0].path)),
            "run": loaded.config.output_dir,
            "command": command_line("sd3tune", "train", name),
        }


def create(workspace: Workspace, name: str, preset: str, base: str, photos: str, caption: str) -> Draft:
    """Write a new configuration from a preset, as `sd3tune config new` does, and return it. Raises ConfigError.

    The working directory is the first opened folder.
    """
    draft = Draft.of(workspace, f"{name}.yaml")
    if os.path.lexists(draft.file):
        raise ConfigError(f"{draft.file.name}: already exists; choose another name, or open it")
    given = UserValues(name, Path(draft.file.name), workspace.shown(workspace.path(photos)), caption or None)
    text = text_from_preset(Preset(find_preset(preset)), given)
    if base not in BASES:
        raise ConfigError(f"{base}: unknown base; choose one of the list, or write it in the YAML")
    if base:
        text = with_value(text, ("model", "base"), base)
        for path, value in BASES[base][1].items():
            text = with_value(text, path, value)
    if problems := draft.check(text)["problems"]:
        raise ConfigError(*(one["text"] for one in problems))
    write_text(draft.file, text)
    return draft


def outside(workspace: Workspace, config: Config) -> list[str]:
    """Return a line for each path of a configuration that is outside the opened folders."""
    values = config.model_dump()
    found = []
    for path, is_path in paths_in(Config, values):
        text, key = value_at(values, path), ".".join(map(str, path))
        if is_path(text, workspace.root) and not workspace.holds(Path(text)):
            found.append(f"{key}: {text}: outside the opened folders; open them, too: sd3tune ui . FOLDER")
    return found


def _check_extended(workspace: Workspace, text: str) -> None:
    """Raise Outside if a text extends a file outside the opened folders, before that file is read."""
    try:
        values = parse(text).value
    except YamlError:
        return  # which the loader explains
    names = values.get(KEY) if isinstance(values, dict) else None
    for name in names if isinstance(names, list) else [names]:
        if isinstance(name, str) and not name.startswith(PRESET):
            workspace.path(os.path.expanduser(name))


def edited(text: str, path: Sequence[str | int], value: Any, raw: str | None) -> str:
    """Return the text with one value changed; `raw` is a value as it is to be written. Raises ConfigError."""
    if not path:
        raise ConfigError("name the key to change")
    return with_value(text, tuple(path), Raw(raw) if raw is not None else value)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _placed(problem: str, file: Path) -> dict[str, Any]:
    """Return a problem of the loader with its line and key apart."""
    found = _LINE.fullmatch(problem)
    if found is None or found["file"] != str(file):
        return {"line": None, "key": None, "text": problem.removeprefix(f"{file}: ")}
    return {"line": int(found["line"]), "key": found["key"], "text": found["text"]}
