"""`sd3tune sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sd3tune.cli.completion import complete_config


def sweep(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="The YAML file of the sweep.", autocompletion=complete_config),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, and print the trials and the cost of one.")
    ] = False,
    join: Annotated[
        bool, typer.Option("--join", help="Help a sweep that another process is at work on, also on another machine.")
    ] = False,
) -> None:
    """Train many times with other values of some keys, and compare. The same command continues a stopped sweep."""
    from sd3tune.commands.sweep import run_sweep

    run_sweep(file, dry_run=dry_run, join=join)
