"""`extends`: merge a file over other files, key by key, and record the origin of each value."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3tune import __version__
from sd3tune.config.files import read_text, short_path
from sd3tune.config.presets import find_preset
from sd3tune.config.problems import shown
from sd3tune.config.schema import CONFIG_VERSION
from sd3tune.config.tree import Origin, Tree, drop_keys_of_former_kinds
from sd3tune.config.yaml12 import KeyPath, YamlError, parse
from sd3tune.errors import ConfigError

KEY = "extends"
PRESET = "preset:"
"""Prefix of a shipped preset's name, to tell it from a path."""
_MAX_EXTENDED = 100
"""Limit on names in `extends`, of all files together, as each costs a merge."""


def tree_of_text(text: str, source: str) -> Tree:
    """Parse the YAML text of the file `source`, which need not exist, and merge it over the files that it extends.

    Raises:
        ConfigError: not YAML, made for a newer sd3tune, or it extends a missing file or, directly or not, itself.
    """
    files = _Files(itertools.count(0, -1))
    return _inherit(_tree(text, source, next(files.numbers)), (source,), files)


def tree_of_values(values: dict[str, Any], folder: Path) -> Tree:
    """Merge plain values over the files that they extend; paths are relative to `folder`. Raises ConfigError."""
    return _inherit(Tree(values, root=Origin("config", (0, 0), folder)), (), _Files(itertools.count(-1, -1)))


def refuse_newer_version(tree: Tree) -> None:
    """Raise ConfigError for values made for a newer sd3tune."""
    version = tree.values.get("config_version")
    if isinstance(version, int) and version > CONFIG_VERSION:
        origin = tree.origin(("config_version",))
        raise ConfigError(
            f"{origin.label}: config_version {version} is newer than what sd3tune {__version__} understands "
            f"({CONFIG_VERSION}); upgrade it: pip install --upgrade sd3tune"
        )


def _tree(text: str, source: str, number: int) -> Tree:
    """Parse one file without the files that it extends."""
    try:
        document = parse(text)
    except YamlError as error:
        raise ConfigError(f"{source}:{error.line}: {error.message}") from None
    if document.value is None:
        raise ConfigError(f"{source}: is empty; a configuration names at least data.sources")
    if not isinstance(document.value, dict):
        raise ConfigError(f"{source}:{document.lines[()]}: a configuration consists of lines such as `name: my-lora`")
    folder = Path(source).absolute().parent

    def at(line: int) -> Origin:
        return Origin(f"{source}:{line}", (number, line), folder)

    tree = Tree(document.value, root=Origin(source, (number, 0), folder))
    tree.origins = {path: at(line) for path, line in document.lines.items() if path}
    tree.problems = [(path, at(line), message) for path, line, message in document.problems]
    refuse_newer_version(tree)
    return tree


@dataclass
class _Files:
    """The files that a configuration extends; each is read and merged only once, even if named several times."""

    numbers: Iterator[int]
    """Numbers for the next files; see `Origin.order`."""
    whole: dict[str, Tree] = field(default_factory=dict)
    named: int = 0


def _inherit(tree: Tree, chain: tuple[str, ...], files: _Files) -> Tree:
    """Merge `tree` over the files that it extends, in order; `chain` holds the extending files, the tree's own last."""
    if KEY not in tree.values:
        return tree
    below: Tree | None = None
    for name, origin in _take_extends(tree):
        files.named += 1
        if files.named > _MAX_EXTENDED:
            raise ConfigError(
                f"{origin.label}: {KEY}: more than {_MAX_EXTENDED} files are extended, directly and indirectly"
            )
        source = _source(name, origin)
        _refuse_circle(source, chain, origin)
        if source not in files.whole:
            files.whole[source] = _read(source, origin, chain, files)
        parent = files.whole[source]
        below = parent if below is None else _merge(below, parent)
    return tree if below is None else _merge(below, tree)


def _read(source: str, origin: Origin, chain: tuple[str, ...], files: _Files) -> Tree:
    try:
        text = read_text(source, typed=False)
    except ConfigError as error:
        raise ConfigError(*(f"{origin.label}: {KEY}: {problem}" for problem in error.problems)) from None
    return _inherit(_tree(text, source, next(files.numbers)), (*chain, source), files)


def _take_extends(tree: Tree) -> list[tuple[str, Origin]]:
    """Remove `extends` from the tree, and return its names, each with its origin."""
    names = tree.values.pop(KEY)
    listed = names if isinstance(names, list) else [names]
    if not listed or not all(isinstance(name, str) and name for name in listed):
        raise ConfigError(
            f"{tree.origin((KEY,)).label}: {KEY}: {shown(names)} is neither a file, nor `{PRESET}` and a name, nor a "
            "list of these"
        )
    found = [(name, tree.origin((KEY, index))) for index, name in enumerate(listed)]
    tree.origins = {path: origin for path, origin in tree.origins.items() if path[0] != KEY}
    return found


def _source(name: str, origin: Origin) -> str:
    """Return the path of an extended file, relative to the working directory if it is inside."""
    if name.startswith(PRESET):
        try:
            path = find_preset(name.removeprefix(PRESET))
        except ConfigError as error:
            raise ConfigError(f"{origin.label}: {KEY}: {error.problems[0]}") from None
    else:
        path = Path(os.path.abspath(os.path.join(origin.folder, os.path.expanduser(name))))
    return short_path(path)


def _refuse_circle(source: str, chain: tuple[str, ...], origin: Origin) -> None:
    known = [os.path.realpath(file) for file in chain]
    if os.path.realpath(source) in known:
        circle = [*chain[known.index(os.path.realpath(source)) :], source]
        raise ConfigError(f"{origin.label}: {KEY}: a circle: {' extends '.join(circle)}; remove one of these `extends`")


def _merge(below: Tree, above: Tree) -> Tree:
    """Merge `above` over `below`: sections key by key; any other value, lists included, replaces the value below."""
    values = _copied(below.values)
    replaced: dict[KeyPath, Origin] = {}

    def lay(path: KeyPath, section: dict[str, Any], key: str, value: Any) -> None:
        if isinstance(value, dict) and isinstance(section.get(key), dict):
            for inner_key, inner in value.items():
                lay((*path, inner_key), section[key], inner_key, inner)
        else:
            section[key] = _copied(value)
            replaced[path] = above.origin(path)

    for key, value in above.values.items():
        lay((key,), values, key, value)
    kept = {
        path: origin
        for path, origin in below.origins.items()
        if not any(path[:length] in replaced for length in range(1, len(path) + 1))
    }
    merged = Tree(
        values,
        root=above.root,
        origins={**kept, **replaced, **above.origins},
        problems=list(dict.fromkeys([*below.problems, *above.problems])),
        notes=list(dict.fromkeys([*below.notes, *above.notes])),
    )
    drop_keys_of_former_kinds(merged, below.values, is_new=lambda path: path in above.origins)
    return merged


def _copied(values: Any) -> Any:
    return {key: _copied(value) for key, value in values.items()} if isinstance(values, dict) else values
