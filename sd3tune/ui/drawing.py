"""From the form of *Try* to the words of `sd3tune infer`.

The form is a dictionary from the name of a parameter to its value as text. `inference.image_request` and
`inference.job` declare the parameters for the form, the command line and the recipe.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sd3tune.errors import ConfigError, UserError
from sd3tune.inference import image_request
from sd3tune.inference.job import ALL_PARAMETERS
from sd3tune.inference.job import PARAMETERS as JOB_PARAMETERS
from sd3tune.inference.lora_argument import parse_lora
from sd3tune.inference.parameters import Parameter
from sd3tune.model.base.offline import offline_kind
from sd3tune.ui.workspace import Workspace

Values = Mapping[str, Any]
"""Name of a parameter -> its text, a list of texts, or a switch; an empty one is not given."""

SAMPLERS = ("euler", "heun", "dpmpp")
"""As in `sampling.samplers`, which imports PyTorch."""
_NOT_OFFERED = ("prompts", "config")
"""Files that name further files, which may lie anywhere."""
OFFERED = {name: one for name, one in ALL_PARAMETERS.items() if one.help is not None and name not in _NOT_OFFERED}
"""The parameters that the page sets."""
_FIRST = ("from_picture", "loras", "embeddings", "base")
"""Those that a command begins with."""
AXES = ("weight", "lora", *(name for name, one in image_request.PARAMETERS.items() if one.axis))
_CHECKED_LATER = ("sampler",)
"""Their check imports PyTorch; the page offers the valid values only."""
ON_THE_HUB = re.compile(r"\w[\w.-]*/\w[\w.-]*(?::[\w./-]+)?", re.ASCII)
_MOST = 200
"""Values of one list."""


def words_of(workspace: Workspace, values: Values, recipe: Values = MappingProxyType({})) -> list[str]:
    """Return the words behind `sd3tune` that draw what the form asks for, paths as the page shows them.

    `recipe` has the values of the picture that `from_picture` repeats; those that did not change are left out. Raises
    ConfigError with a line for each problem that the form alone shows, and Outside for a path.
    """
    problems = [f"{name}: no such setting on this page" for name in values if name not in OFFERED]
    words = ["infer"]
    for name in _FIRST + tuple(name for name in OFFERED if name not in _FIRST):
        try:
            words += _option(workspace, OFFERED[name], values.get(name), recipe.get(name))
        except ConfigError as error:
            problems += error.problems
    problems = problems or _missing(values)
    if problems:
        raise ConfigError(*problems)
    return words


def _option(workspace: Workspace, parameter: Parameter, value: Any, former: Any) -> list[str]:
    """Return the words of one parameter; none if it is not given, or as in the recipe."""
    if isinstance(value, bool):
        return [] if value == former else _switch(parameter, value, former is not None)
    if value in (None, "", []):
        is_cleared = value == "" and parameter.type is str and former not in (None, "")
        return [parameter.flag, ""] if is_cleared else []
    if isinstance(value, list):
        if "" in value or len(value) > _MOST:
            raise ConfigError(f"{parameter.flag}: one to {_MOST} paths or names, none of them empty")
        return [word for one in value for word in (parameter.flag, _checked(workspace, parameter, one))]
    text = _checked(workspace, parameter, value)
    known = _read(parameter, former)
    if former is None and parameter.name in JOB_PARAMETERS:  # an image's other defaults depend on the adapter
        known = parameter.default
    return [] if known is not None and parameter.read(text) == known else [parameter.flag, text]


def _read(parameter: Parameter, former: Any) -> Any:
    """Return the value of a recipe's text; None if it has none, or one that a stranger made up."""
    try:
        return None if former is None else parameter.read(former)
    except ConfigError:
        return None


def _switch(parameter: Parameter, value: bool, is_override: bool) -> list[str]:
    if parameter.type is not bool:
        raise ConfigError(f"{parameter.flag}: write a text")
    on, _, off = parameter.flags.partition("/")
    chosen = on if value else off
    return [chosen] if chosen and (is_override or value != parameter.default) else []


def _checked(workspace: Workspace, parameter: Parameter, text: Any) -> str:
    """Return the text of a value, or of a path as the page shows it. Raises ConfigError and Outside."""
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError(f"{parameter.flag}: write a text")
    if parameter.name == "loras":
        return _adapter(workspace, text)
    if parameter.name in ("embeddings", "base"):
        return _location(workspace, text, parameter.flag)
    if parameter.name == "grid":
        return _axis(workspace, text)
    if parameter.name in ("out", "from_picture", "look_in", "image", "mask"):
        return workspace.shown(workspace.path(text))
    found = parameter.read(text)
    fault = None if parameter.name in _CHECKED_LATER else parameter.check(found)
    if fault is not None:
        raise ConfigError(f"{parameter.flag} {text}: {fault}")
    return text


def _adapter(workspace: Workspace, text: str, flag: str = "--lora ") -> str:
    try:
        path, weight = parse_lora(text, flag)
    except UserError as error:
        raise ConfigError(*error.problems) from None
    place = _location(workspace, str(path), flag.strip())
    return place if weight == 1 else f"{place}@{text.rpartition('@')[2]}"


def _location(workspace: Workspace, text: str, flag: str) -> str:
    """Return a path in the opened folders, a Hub id or an offline base. Raises Outside, ConfigError if it is neither.

    A name such as `user/name` is a path if there is a folder `user`.
    """
    if offline_kind(text) is not None and flag == "--base":
        return text
    if ON_THE_HUB.fullmatch(text) and not (workspace.root / Path(text).parts[0]).exists():
        return text
    path = workspace.path(text)
    if not path.exists():
        raise ConfigError(f"{flag} {text}: neither a file or folder here nor a repository such as user/name")
    return workspace.shown(path)


def _axis(workspace: Workspace, text: str) -> str:
    """Check an axis of a grid, `NAME=VALUE,VALUE`; the adapters on a `lora` axis are paths."""
    name, equals, values = text.partition("=")
    if name not in AXES:
        raise ConfigError(f"--grid {name}: no such axis; one of {', '.join(AXES)}")
    separator = "|" if "|" in values else ","
    parts = [part.strip() for part in values.split(separator)]
    if not equals or not all(parts):
        raise ConfigError(f"--grid {name}: write values such as {_EXAMPLES.get(name, '0,0.5,1')}")
    if name == "lora":
        return f"lora={separator.join(_on_axis(workspace, part) for part in parts)}"
    for part in parts:
        if name == "weight":
            _number(part)
        else:
            _checked(workspace, image_request.PARAMETERS[name], part)
    return f"{name}={separator.join(parts)}"


def _on_axis(workspace: Workspace, value: str) -> str:
    """Check an adapter of an axis. A pattern may not leave the opened folders, also not through links."""
    if not glob.has_magic(value):
        return _adapter(workspace, value, "--grid lora=")
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise ConfigError(f"--grid lora={value}: a pattern begins in {workspace.root} and has no `..`")
    for match in sorted(workspace.root.glob(value)):
        workspace.path(str(match))
    return value


def _number(text: str) -> None:
    try:
        float(text)
    except ValueError:
        raise ConfigError(f"--grid weight={text}: each value is a number") from None


def _missing(values: Values) -> list[str]:
    """Return a line for each choice that a drawing needs, but for one that repeats a picture."""
    if values.get("from_picture"):
        return []
    varied = {str(axis).partition("=")[0] for axis in values.get("grid") or []}
    problems = []
    if not any(values.get(name) for name in ("loras", "embeddings", "base")) and "lora" not in varied:
        problems.append("Choose a run, an adapter or a base to draw with.")
    if not values.get("prompt") and "prompt" not in varied:
        problems.append("Write a prompt: the text to draw.")
    return problems


_EXAMPLES = {
    "lora": "runs/rex/checkpoints", "prompt": "a dog|a cat", "seed": "0,1,2", "steps": "10,20,40", "guidance": "3,5,7",
    "sampler": ",".join(SAMPLERS), "shift": "1,3,5", "slg": "0,2.8", "strength": "0.4,0.6,0.8",
}  # fmt: skip


def examples() -> Mapping[str, str]:
    """Return an example of each axis' values."""
    return {name: _EXAMPLES.get(name, "0,0.5,1") for name in AXES}
