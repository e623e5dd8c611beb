"""The run folder of a configuration that lies in one, and of a rehearsal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sd3tune.config.schema import Config
from sd3tune.config.sections.model import OFFLINE_BASES
from sd3tune.config.shape import value_at
from sd3tune.config.tree import Origin, Tree
from sd3tune.files.json import NotJson
from sd3tune.files.own_json import read_object

CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
MARKER = "sd3tune_run"
"""The key in `run.json` that says a run wrote it; its value is the version of the folder's layout."""
LAYOUT_VERSION = 1
_KEY = ("output_dir",)
_BASE = ("model", "base")
_BEFORE_THE_MARKER = {"versions", "resumes", "timings"}
"""Keys of every `run.json` that has no marker yet."""
_RANDOM_BASES = {base for base in OFFLINE_BASES if base.startswith("tiny")}


def use_own_folder(tree: Tree, source: str) -> None:
    """Make `output_dir` of a run folder's own `config.yaml` that folder, which may have been moved or copied.

    To be called before overrides are applied, so that theirs wins. A copy of the file elsewhere keeps its `output_dir`.
    """
    file = Path(source).absolute()
    written = value_at(tree.values, _KEY)
    if file.name != CONFIG_FILE or not is_run_folder(file.parent) or not isinstance(written, str):
        return
    if os.path.realpath(file.parent.joinpath(os.path.expanduser(written))) == os.path.realpath(file.parent):
        return
    tree.write(_KEY, str(file.parent), Origin(source, tree.root.order, file.parent))
    tree.notes.append(f"{source} lies in a run folder, so output_dir is {file.parent} and not {written}")


def leave_folder_to_the_run(tree: Tree, own_base: object) -> None:
    """Give a rehearsal the folder `runs/NAME-tiny`, so that it does not block the run itself, which is in `runs/NAME`.

    A rehearsal is a configuration whose overrides replace its `own_base` by one with random weights. One that has a
    name or an `output_dir` of its own keeps it. To be called after overrides are applied.
    """
    base, name = value_at(tree.values, _BASE), tree.values.get("name", Config.model_fields["name"].default)
    if not _is_random(base) or _is_random(own_base):
        return
    if value_at(tree.values, _KEY) is not None or tree.origin(("name",)).override is not None:
        return
    folder = os.path.join("runs", str(name))
    tree.values["output_dir"] = os.path.abspath(f"{folder}-tiny")
    tree.notes.append(f"{tree.origin(_BASE).label}: a rehearsal goes to {folder}-tiny and leaves {folder} to the run")


def _is_random(base: object) -> bool:
    return isinstance(base, str) and base in _RANDOM_BASES


def is_run_folder(folder: Path) -> bool:
    """Whether a run has written into this folder. Other programs have a `run.json`, too."""
    return "argv" in read_run_file(folder)


def read_run_file(folder: Path) -> dict[str, Any]:
    """Return the `run.json` of a run, or of its copy on the Hub, which lacks `argv`; empty where there is none.

    Also empty for one that another program wrote or that cannot be read.
    """
    try:
        described = read_object(folder / RUN_FILE)
    except (OSError, NotJson):
        return {}
    ours = type(described.get(MARKER)) is int or described.keys() >= _BEFORE_THE_MARKER
    return described if ours else {}
