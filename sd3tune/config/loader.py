"""Load and check a configuration from a YAML file and overrides; all problems are reported at once, with lines."""

from __future__ import annotations

import copy
import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sd3tune.config.extends import refuse_newer_version, tree_of_text, tree_of_values
from sd3tune.config.files import read_text
from sd3tune.config.overrides import apply_overrides
from sd3tune.config.problems import dotted, explain
from sd3tune.config.run_folder import use_own_folder, use_rehearsal_folder
from sd3tune.config.schema import Config, ConfigType
from sd3tune.config.sections.optimizer import OptimizerSection
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import fill_kinds, paths_in, section_at, value_at
from sd3tune.config.tree import Origin, Tree
from sd3tune.config.yaml12 import KeyPath
from sd3tune.errors import ConfigError
from sd3tune.files.text import flaw

_MAX_PROBLEMS = 100
"""Maximum number of problems reported at once."""


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration, with notes for the user on how it was loaded."""

    config: Config
    notes: tuple[str, ...] = ()


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file, apply `a.b.c=value` overrides and check the result.

    Paths in a file, also an extended one, are relative to that file; paths in overrides to the working directory.
    All become absolute. The `config.yaml` of a run folder describes the run in that folder, also after a move.

    Raises:
        ConfigError: one line per problem, `run.yaml:7: train.steps: -5 is too small; at least 1`.
    """
    source = os.fspath(path)
    tree = tree_of_text(read_text(source), source)
    use_own_folder(tree, source)
    own_base = value_at(tree.values, ("model", "base"))
    apply_overrides(tree, overrides)
    use_rehearsal_folder(tree, own_base)
    return _checked(tree)


def load_text(text: str, source: str, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Check a text as `load_config` checks the file `source`, which need not exist. Raises ConfigError."""
    tree = tree_of_text(text, source)
    apply_overrides(tree, overrides)
    return _checked(tree)


def parse_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, folder: str | os.PathLike[str] | None = None
) -> LoadedConfig:
    """Check plain values as `load_config` checks a file.

    Their paths are relative to `folder`, or to the working directory without one.

    Raises:
        ConfigError: one line per problem.
    """
    tree = tree_of_values(copy.deepcopy(dict(values)), Path(folder or ".").absolute())
    apply_overrides(tree, overrides)
    return _checked(tree)


def config_in_code(sections: Mapping[str, Any]) -> Config:
    """Check the arguments of `Config(...)`: plain values, `os.PathLike` for paths, or sections of other configurations.

    Raises ConfigError, as `parse_config` does.
    """
    return parse_config({name: _plain(value) for name, value in sections.items()}).config


ConfigType.check = staticmethod(config_in_code)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _checked(tree: Tree) -> LoadedConfig:
    refuse_newer_version(tree)
    _use_usual_rate(tree.values)
    fill_kinds(Config, tree.values)
    flawed = dict(_flawed_texts(tree.values))
    for path in _resolve_paths(tree.values, lambda path: tree.origin(path).folder):
        if "\0" not in value_at(tree.values, path):
            flawed.pop(path, None)  # half a character there is a byte of a file name that is not UTF-8
    tree.problems += [(path, tree.origin(path), message) for path, message in flawed.items()]
    config = None
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        unreadable = {path for path, _, _ in tree.problems if path and value_at(tree.values, path) is None}
        found = explain(error.errors(include_url=False), tree.values)
        for path, message in itertools.islice(found, _MAX_PROBLEMS + 1):
            if path not in unreadable and path not in flawed:
                tree.problems.append((path, tree.origin(path or _first_key(message)), message))
    if config is None or tree.problems:
        ordered = sorted(tree.problems, key=lambda problem: problem[1].order)
        lines = list(dict.fromkeys(_line(*problem) for problem in ordered))
        if len(lines) > _MAX_PROBLEMS:
            lines[_MAX_PROBLEMS:] = [f"{tree.root.label}: has more than {_MAX_PROBLEMS} problems; these are the first"]
        raise ConfigError(*lines)
    return LoadedConfig(config, tuple(tree.notes))


def _line(path: KeyPath, origin: Origin, message: str) -> str:
    if not path or path == origin.override:
        return f"{origin.label}: {message}"
    return f"{origin.label}: {dotted(path)}: {message}"


def _first_key(message: str) -> KeyPath:
    """Return the key at the start of a message about several keys: `schedule.warmup_steps is 20 but ...`."""
    key = re.match(r"[a-z0-9_]+(\.[a-z0-9_]+)+", message)
    return tuple(key[0].split(".")) if key else ()


def _flawed_texts(values: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yield the key path and the fault of each text, key or value, that no tokenizer, model card or tracker accepts."""
    waiting: list[tuple[KeyPath, Any]] = [((), values)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [((*path, step), one) for step, one in inner]
        texts = [text for text in (value, *path[-1:]) if isinstance(text, str)]
        if wrong := next(filter(None, map(flaw, texts)), None):
            yield path, wrong


def _resolve_paths(values: dict[str, Any], folder_of: Callable[[KeyPath], Path]) -> set[KeyPath]:
    """Make every path absolute, in place, and return their key paths; values of a wrong type are skipped."""
    resolved = set()
    for path, is_path in paths_in(Config, values):
        section, text, folder = value_at(values, path[:-1]), value_at(values, path), folder_of(path)
        if text and is_path(text, folder):
            section[path[-1]] = _absolute(text, folder)
            resolved.add(path)
    if values.get("output_dir") is None:
        name = values.get("name", Config.model_fields["name"].default)
        values["output_dir"] = _absolute(os.path.join("runs", str(name)), Path.cwd())
    return resolved


def _use_usual_rate(values: dict[str, Any]) -> None:
    """Write the method's usual learning rate, in place, if none is written and the optimizer has no usual one."""
    sections = {name: section_at(values, (name,)) for name in ("method", "optimizer")}
    usual = getattr(sections["method"], "usual_lr", None)
    default = getattr(sections["optimizer"], "model_fields", {}).get("lr")
    if usual is None or default is None or default.default != OptimizerSection.model_fields["lr"].default:
        return
    written = values.setdefault("optimizer", {})
    if isinstance(written, dict):
        written.setdefault("lr", usual)


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))
