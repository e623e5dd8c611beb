"""Configurations in the making: YAML files in the first opened folder, checked as `sd3tune config check` does."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
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
from sd3tune.ui.photos import describe_photos
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


@dataclass(frozen=True)
class Base:
    """A base that the page offers."""

    name: str
    about: str
    values: dict[KeyPath, Any] = field(default_factory=dict)
    """The keys to write with it."""

    @property
    def is_small(self) -> bool:
        """True for a base that comes with sd3tune, and draws 64 pixels."""
        return bool(self.values)


_RELEASED = "Many gigabytes, downloaded at first use, after you have accepted its licence."
BASES: dict[str, Base] = {
    "": Base("as in the preset", "The released model that the preset names, downloaded at first use."),
    "nano": Base("nano (try it: no download)", "Small and real: draws shapes of 64 pixels, in minutes.", _SMALL_BASE),
    "tiny": Base(
        "tiny (a test)", "Random weights, to see in seconds that all works.", {**_SMALL_BASE, ("train", "steps"): 20}
    ),
    "stabilityai/stable-diffusion-3.5-medium": Base("Stable Diffusion 3.5 medium", _RELEASED),
    "stabilityai/stable-diffusion-3.5-large": Base("Stable Diffusion 3.5 large", _RELEASED),
    "stabilityai/stable-diffusion-3-medium-diffusers": Base("Stable Diffusion 3 medium", _RELEASED),
}
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

    Without a caption every photo needs its own, and previews draw the first of these. The working directory is the
    first opened folder.
    """
    draft = Draft.of(workspace, f"{name}.yaml")
    if os.path.lexists(draft.file):
        raise ConfigError(f"{draft.file.name}: already exists; choose another name, or open it")
    if base not in BASES:
        raise ConfigError(f"{base}: unknown base; choose one of the list, or write it in the YAML")
    folder = workspace.path(photos)
    shown = caption or own_caption(workspace, folder)
    given = UserValues(name, Path(draft.file.name), workspace.shown(folder), caption or None)
    text = text_from_preset(Preset(find_preset(preset)), given)
    if not caption:
        text = with_value(text, ("data", "sources", 0, "caption"), None)
    if not caption or BASES[base].is_small:
        text = with_value(text, ("preview", "prompts"), [shown])
    if BASES[base].is_small:
        text = _without_preparations(text)
    if base:
        for path, value in {("model", "base"): base, **BASES[base].values}.items():
            text = with_value(text, path, value)
    if problems := draft.check(text)["problems"]:
        raise ConfigError(*(one["text"] for one in problems))
    write_text(draft.file, text)
    return draft


def _without_preparations(text: str) -> str:
    """Return a preset's text without the comments on top that are about a released model's licence, size and memory."""
    comments, name, rest = text.partition("\nname:")
    kept = comments[: comments.find("\n#\n")] if "\n#\n" in comments else comments
    return f"{kept}\n{name}{rest}"


def own_caption(workspace: Workspace, folder: Path) -> str:
    """Return the caption of a folder's first photo. Raises ConfigError if a photo has none, or there is no photo."""
    found = describe_photos(workspace, folder, 1024)
    if found["problems"]:
        raise ConfigError(*found["problems"])
    photos = found["photos"]
    bare = sum(not photo["caption"] for photo in photos)
    if bare:
        of = "the photo has" if len(photos) == 1 else f"{bare} of {len(photos)} photos have"
        raise ConfigError(f"{of} no caption; write one for all, such as: a photo of sks dog")
    text: str = photos[0]["caption"]
    return text


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
