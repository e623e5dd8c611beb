"""Reading of configuration files; errors give the reason and suggest similar file names."""

from __future__ import annotations

import difflib
from pathlib import Path

from sd3tune.errors import ConfigError
from sd3tune.files.regular import Refused, open_regular
from sd3tune.files.text import NotText, decode

_MAX_BYTES = 1 << 20


def read_text(source: str, typed: bool = True) -> str:
    """Return the text of the file `source`; a pipe or device is read only if the user `typed` its name.

    Raises ConfigError.
    """
    path = Path(source)
    try:
        if path.is_dir():
            raise ConfigError(f"{source} is a folder; name a YAML file{_yaml_files_in(path)}")
        with path.open("rb") if typed else open_regular(path, largest=None) as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{source} does not exist{_similar(path)}") from None
    except Refused as error:
        raise ConfigError(f"{source} {error.strerror}") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(f"{source} cannot be read: {reason}") from None
    if len(data) > _MAX_BYTES:
        raise ConfigError(f"{source} is not a configuration: it is larger than 1 MiB")
    try:
        return decode(data, source)
    except NotText as error:
        raise ConfigError(str(error)) from None


def short_path(path: Path) -> str:
    """Return a path relative to the working directory if it is inside, else unchanged."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _yaml_files_in(folder: Path) -> str:
    names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    return f" in it, such as {', '.join(names[:3])}" if names else ""


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f"; neither does the folder {path.parent}"
    names = {entry.name: entry for entry in path.parent.iterdir() if entry.suffix in (".yaml", ".yml")}
    near = difflib.get_close_matches(path.name, names, n=2)
    return f"; did you mean {' or '.join(str(names[name]) for name in near)}?" if near else ""
