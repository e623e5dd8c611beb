"""The shipped configurations, with their folder and descriptions."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sd3tune
from sd3tune.errors import ConfigError
from sd3tune.invocation import command_line

SCHEMA_FILE = "schema.json"
"""The JSON Schema, in the same folder as the presets that refer to it."""

_CHECKOUT_ONLY = "nano_"
"""Name prefix of configurations that need files made in a checkout, so they are not offered as presets."""
_MODELINE = "# yaml-language-server:"


@dataclass(frozen=True)
class Preset:
    """A shipped YAML."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def description(self) -> str:
        """The first line of the header comment below its command."""
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return next(line for line in _comments(lines[1:]))


def presets_folder() -> Path:
    """Return `configs/` of a checkout or, from a wheel, of the package. Raises ConfigError if there is none."""
    package = Path(sd3tune.__file__).absolute().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / SCHEMA_FILE).is_file():
            return folder
    raise ConfigError(f"{package}: this installation lacks the shipped configurations; install sd3tune again")


def all_presets() -> list[Preset]:
    """Return all presets, sorted by name. Raises ConfigError."""
    paths = sorted(presets_folder().glob("*.yaml"))
    return [Preset(path) for path in paths if not path.name.startswith(_CHECKOUT_ONLY)]


def find_preset(name: str) -> Path:
    """Return the file of a preset. Raises ConfigError for an unknown name."""
    paths = {preset.name: preset.path for preset in all_presets()}
    wanted = name.removesuffix(".yaml")
    if wanted in paths:
        return paths[wanted]
    near = difflib.get_close_matches(wanted, paths, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(f"no preset is called {name!r}; {hint}`{command_line('sd3tune', 'config', 'list')}` shows all")


def _comments(lines: list[str]) -> Iterator[str]:
    """Yield the text of the comment lines, without the line for editors."""
    for line in lines:
        text = line.lstrip("#").strip()
        if line.startswith("#") and text and not line.startswith(_MODELINE):
            yield text
