"""Arguments that several commands have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.terminal import say

ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.")]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  typer reads the annotation at run time
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=50 or model.base=tiny."),
]


def print_notes(notes: tuple[str, ...]) -> None:
    """What the user should be told about how a configuration came about."""
    for note in notes:
        say(f"note: {note}", to=sys.stderr)
