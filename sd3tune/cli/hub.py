"""`sd3tune hub push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.completion import complete_run
from sd3tune.cli.imports import quick_imports

hub_app = typer.Typer(help="Share runs on the Hugging Face Hub.", no_args_is_help=True)


@hub_app.callback()
def hub() -> None:
    """Share runs on the Hugging Face Hub."""


@hub_app.command()
def push(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a finished run.", autocompletion=complete_run)
    ],
    repo_id: Annotated[
        Optional[str],  # noqa: UP045  typer reads the annotation at run time
        typer.Option(metavar="USER/NAME", help="The repository; by default the configuration's hub.repo_id."),
    ] = None,
    thumbnail: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="PICTURE", help="Thumbnail for UIs, stored in the uploaded adapter."),
    ] = None,
) -> None:
    """Upload a run's adapter, model card, pictures and configuration; later uploads send only changes."""
    with quick_imports(f"hub push {run}"):
        from sd3tune.commands.hub_push import run_push

    run_push(run, repo_id, thumbnail)
