"""`sd3tune runs` and `sd3tune report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.completion import complete_run
from sd3tune.cli.imports import quick_imports


def runs(
    folders: Annotated[
        Optional[list[Path]],  # noqa: UP045  typer reads the annotation at run time
        typer.Argument(metavar="[DIR]...", help="Folders that hold runs; by default runs/ and all that you began."),
    ] = None,
) -> None:
    """List runs: state, steps, lowest held-out loss, and the command that comes next."""
    from sd3tune.commands.runs import run_runs

    run_runs(folders or ())


def report(
    folders: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="The folder of a run, finished or not; several are compared.",
            autocompletion=complete_run,
        ),
    ],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="File to write; by default RUN/report.html, or comparison.html."),
    ] = None,
    photos: Annotated[
        bool, typer.Option("--photos/--no-photos", help="Show small copies of training photos, and their captions.")
    ] = True,
) -> None:
    """Write one HTML file about a run: pictures, curves, data, configuration. It needs no network."""
    with quick_imports(f"report {folders[0]}"):
        from sd3tune.commands.report import run_report

    run_report(folders, out, photos)
