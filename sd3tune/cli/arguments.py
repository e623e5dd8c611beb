"""Arguments shared by several commands, and options shared by all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.completion import complete_config
from sd3tune.reporting import JsonReporter, Reporter, say

ConfigArgument = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="The YAML file of the run.", autocompletion=complete_config)
]
Overrides = Annotated[
    Optional[list[str]],  # noqa: UP045  typer reads the annotation at run time
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, such as train.steps=50 or model.base=tiny."),
]

Quiet = Annotated[bool, typer.Option("--quiet", help="Print only warnings, errors and results.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object a line, for other programs.")]


def take_reporter(arguments: Sequence[str]) -> tuple[Reporter, list[str]]:
    """Return the reporter for `--quiet` and `--json`, placed before or after the command, and the other arguments."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    options = {"--quiet", "--json"} & set(arguments[:end])
    rest = [argument for argument in arguments[:end] if argument not in options]
    kind = JsonReporter if "--json" in options else Reporter
    return kind(quiet="--quiet" in options), [*rest, *arguments[end:]]


def print_notes(notes: tuple[str, ...]) -> None:
    """Print notes on how a configuration was loaded."""
    for note in notes:
        say(f"note: {note}", aside=True)
