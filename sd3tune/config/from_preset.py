"""A new configuration: the text of a preset, comments included, with the user's values filled in."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

import sd3tune
from sd3tune.config.dump import dump_text
from sd3tune.config.presets import SCHEMA_FILE, Preset
from sd3tune.config.yaml12 import KeyPath

_DEMO_PICTURES = "sd3tune/assets/demo"


@dataclass(frozen=True)
class UserValues:
    """Values given by the user; None keeps the preset's value."""

    name: str
    out: Path
    data: str | None = None
    """A folder, relative to the working directory."""
    caption: str | None = None


def text_from_preset(preset: Preset, given: UserValues) -> str:
    """Return the YAML for `given.out`. In prompts, the preset's caption is replaced by the new one, too."""
    edited = _Text(preset.path.read_text(encoding="utf-8"))
    name, path = edited.value(("name",)), edited.value(("data", "sources", 0, "path"))
    folder = _folder(path, given)
    edited.replace(("name",), given.name)
    edited.replace(("data", "sources", 0, "path"), folder)
    if given.caption is not None:
        _caption(edited, given.caption)
    text = edited.result()
    for old, new in {
        f"configs/{preset.path.name}": str(given.out),
        f"configs/{os.path.normpath(path)}": os.path.normpath(os.path.join(given.out.parent, folder)),
        f"runs/{name}": f"runs/{given.name}",
        f"$schema={SCHEMA_FILE}": f"$schema={preset.path.with_name(SCHEMA_FILE).as_uri()}",
    }.items():
        text = text.replace(old, new)
    return text


def _folder(path: str, given: UserValues) -> str:
    """Return the source's path for the new file: absolute, or relative to its folder."""
    if given.data is None:
        return str(Path(sd3tune.__file__).absolute().parents[1] / _DEMO_PICTURES) if _DEMO_PICTURES in path else path
    if os.path.isabs(given.data) or given.data.startswith("~"):
        return given.data
    relative = os.path.relpath(given.data, given.out.parent)
    return relative if relative.startswith("..") else os.path.join(".", relative)


def _caption(edited: _Text, caption: str) -> None:
    source: KeyPath = ("data", "sources", 0)
    if not edited.has((*source, "caption")):
        edited.add_below((*source, "path"), "caption", caption)
        return
    former = edited.value((*source, "caption"))
    edited.replace((*source, "caption"), caption)
    prompts: KeyPath = ("preview", "prompts")
    for number in range(edited.length(prompts)):
        prompt = edited.value((*prompts, number))
        if isinstance(prompt, str) and former in prompt:
            edited.replace((*prompts, number), prompt.replace(former, caption))


@dataclass
class _Text:
    """A YAML text with editable values; the rest of the text is unchanged."""

    text: str
    edits: list[tuple[int, int, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = yaml.compose(self.text, Loader=yaml.SafeLoader)

    def has(self, path: KeyPath) -> bool:
        return self._node(path) is not None

    def value(self, path: KeyPath) -> str:
        return str(self._found(path).value)

    def length(self, path: KeyPath) -> int:
        return len(self._found(path).value) if self.has(path) else 0

    def replace(self, path: KeyPath, value: str) -> None:
        """Replace a value, and keep the column of a comment behind it if there is room."""
        node, new = self._found(path), dump_text(value)
        start, end = node.start_mark.index, node.end_mark.index
        line_end = self.text.find("\n", end)
        spaces = len(self.text[end:line_end]) - len(self.text[end:line_end].lstrip(" "))
        if self.text[end + spaces : end + spaces + 1] == "#":
            new += " " * max(spaces + (end - start) - len(new), 2)
            end += spaces
        self.edits.append((start, end, new))

    def add_below(self, path: KeyPath, key: str, value: str) -> None:
        """Insert a line `key: value` below the line of `path`."""
        node = self._found(path)
        column = node.start_mark.column - len(f"{path[-1]}: ")
        end = self.text.index("\n", node.end_mark.index)
        self.edits.append((end, end, f"\n{' ' * column}{key}: {dump_text(value)}"))

    def result(self) -> str:
        text = self.text
        for start, end, new in sorted(self.edits, reverse=True):
            text = text[:start] + new + text[end:]
        return text

    def _found(self, path: KeyPath) -> yaml.Node:
        node = self._node(path)
        if node is None:
            raise KeyError(path)
        return node

    def _node(self, path: KeyPath) -> yaml.Node | None:
        node: yaml.Node | None = self.root
        for step in path:
            if node is None:
                return None
            if isinstance(step, int):
                node = node.value[step]
            else:
                node = next((value for key, value in node.value if key.value == step), None)
        return node
