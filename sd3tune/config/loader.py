"""From a YAML file and overrides to a checked `Config`: every problem at once, each with its line."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sd3tune import __version__
from sd3tune.config.overrides import Origin, Tree, apply_overrides
from sd3tune.config.problems import dotted, explain
from sd3tune.config.schema import CONFIG_VERSION, OFFLINE_BASES, Config
from sd3tune.config.shape import fill_kinds, value_at
from sd3tune.config.yaml12 import KeyPath, YamlError, parse
from sd3tune.errors import ConfigError

_MAX_BYTES = 1 << 20
_WEIGHTS = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # a file's name, though there may be no such file


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration, and what the user should be told about how it came about."""

    config: Config
    notes: tuple[str, ...] = ()


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file, apply `a.b.c=value` overrides and check the result.

    Paths in the file are relative to it, paths in overrides to the working directory; all become absolute.

    Raises:
        ConfigError: one line per problem, `run.yaml:7: train.steps: -5 is too small; at least 1`.
    """
    source = os.fspath(path)
    text = _read(source)
    try:
        document = parse(text)
    except YamlError as error:
        raise ConfigError(f"{source}:{error.line}: {error.message}") from None
    if document.value is None:
        raise ConfigError(f"{source}: is empty; a configuration names at least data.sources")
    if not isinstance(document.value, dict):
        raise ConfigError(f"{source}:{document.lines[()]}: a configuration is made of lines such as `name: my-lora`")

    def at(line: int) -> Origin:
        return Origin(f"{source}:{line}", (0, line))

    tree = Tree(document.value, root=Origin(source, (0, 0)))
    tree.origins = {path: at(line) for path, line in document.lines.items() if path}
    tree.problems = [(path, at(line), message) for path, line, message in document.problems]
    return _checked(tree, overrides, folder=Path(source).absolute().parent)


def parse_config(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, folder: str | os.PathLike[str] | None = None
) -> LoadedConfig:
    """Check plain values as `load_config` checks a file.

    Their paths are relative to `folder`, or to the working directory without one.

    Raises:
        ConfigError: one line per problem.
    """
    tree = Tree(copy.deepcopy(dict(values)), root=Origin("config", (0, 0)))
    return _checked(tree, overrides, folder=Path(folder or ".").absolute())


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a configuration, for editors."""
    schema = Config.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_without_discriminators(schema)}


def _without_discriminators(node: Any) -> Any:
    """anyOf for pydantic's oneOf: `kind` may be left out, so a section can fit several variants."""
    if isinstance(node, dict):
        renamed = {"anyOf" if key == "oneOf" else key: inner for key, inner in node.items() if key != "discriminator"}
        return {key: _without_discriminators(inner) for key, inner in renamed.items()}
    return [_without_discriminators(inner) for inner in node] if isinstance(node, list) else node


def _read(source: str) -> str:
    path = Path(source)
    try:
        if path.is_dir():
            raise ConfigError(f"{source} is a folder; name a YAML file{_yaml_files_in(path)}")
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist{_similar(path)}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{source} cannot be read: {reason}") from None
    if b"\0" in data:
        raise ConfigError(f"{source} is not a configuration: it holds binary data")
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{source} is not a configuration: it is larger than 1 MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise ConfigError(f"{source}:{line}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None


def _yaml_files_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    return f" in it, such as {', '.join(names[:3])}" if names else ""


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; neither does the folder {path.parent}"
    names = {entry.name: entry for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")}
    near = difflib.get_close_matches(path.name, names, n=2)
    return f"; did you mean {' or '.join(str(names[name]) for name in near)}?" if near else ""


def _checked(tree: Tree, overrides: Sequence[str], folder: Path) -> LoadedConfig:
    apply_overrides(tree, overrides)
    _refuse_newer_version(tree)
    fill_kinds(Config, tree.values)
    here = Path.cwd()
    _resolve_paths(tree.values, lambda path: folder if tree.origin(path).override is None else here)
    config = None
    try:
        config = Config.model_validate(tree.values)
    except ValidationError as error:
        unreadable = {path for path, _, _ in tree.problems if path and value_at(tree.values, path) is None}
        for path, message in explain(error.errors(include_url=False), tree.values):
            if path not in unreadable:
                tree.problems.append((path, tree.origin(path or _first_key(message)), message))
    if config is None or tree.problems:
        ordered = sorted(tree.problems, key=lambda problem: problem[1].order)
        raise ConfigError(*dict.fromkeys(_line(*problem) for problem in ordered))
    return LoadedConfig(config, tuple(tree.notes))


def _line(path: KeyPath, origin: Origin, message: str) -> str:
    if not path or path == origin.override:
        return f"{origin.label}: {message}"
    return f"{origin.label}: {dotted(path)}: {message}"


def _first_key(message: str) -> KeyPath:
    """The key that a problem between keys begins with: `schedule.warmup_steps is 20 but ...`."""
    key = re.match(r"[a-z0-9_]+(\.[a-z0-9_]+)+", message)
    return tuple(key[0].split(".")) if key else ()


def _refuse_newer_version(tree: Tree) -> None:
    version = tree.values.get("config_version")
    if isinstance(version, int) and version > CONFIG_VERSION:
        origin = tree.origin(("config_version",))
        raise ConfigError(
            f"{origin.label}: config_version {version} is newer than what sd3tune {__version__} understands "
            f"({CONFIG_VERSION}); upgrade it: pip install --upgrade sd3tune"
        )


def _resolve_paths(values: dict[str, Any], folder_of: Callable[[KeyPath], Path]) -> None:
    """Make every path absolute, in place; values of a wrong type are left for the check to report."""

    def resolve(section: Any, key: str, path: KeyPath) -> None:
        value = section.get(key) if isinstance(section, dict) else None
        if isinstance(value, str) and value:
            section[key] = _absolute(value, folder_of(path))

    data, model = values.get("data"), values.get("model")
    sources = data.get("sources") if isinstance(data, dict) else None
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        resolve(source, "path", ("data", "sources", index, "path"))
    resolve(data, "cache_dir", ("data", "cache_dir"))
    resolve(values, "output_dir", ("output_dir",))
    if values.get("output_dir") is None:
        name = values.get("name", Config.model_fields["name"].default)
        values["output_dir"] = _absolute(os.path.join("runs", str(name)), Path.cwd())
    encoders = model.get("text_encoders") if isinstance(model, dict) else None
    for encoder in encoders if isinstance(encoders, dict) else ():
        resolve(encoders, encoder, ("model", "text_encoders", encoder))
    for key in ("base", "tokenizers"):
        value = model.get(key) if isinstance(model, dict) else None
        if isinstance(value, str) and _is_path(value, folder_of(("model", key))):
            resolve(model, key, ("model", key))


def _absolute(path: str, folder: Path) -> str:
    return os.path.abspath(os.path.join(folder, os.path.expanduser(path)))


def _is_path(base: str, folder: Path) -> bool:
    """Whether a base means a folder or a file rather than an offline base or a Hub id."""
    if base in OFFLINE_BASES:
        return False
    looks_like_one = base in (".", "..", "~") or base.startswith(("./", "../", "/", "~/"))
    return looks_like_one or base.endswith(_WEIGHTS) or (bool(base) and os.path.exists(folder / base))
