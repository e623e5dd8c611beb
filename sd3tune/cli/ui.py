"""`sd3tune ui`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer


def ui(
    folders: Annotated[
        Optional[list[Path]],  # noqa: UP045  typer reads the annotation at run time
        typer.Argument(
            metavar="[FOLDER]...",
            help="Folders to open, by default this one. Configurations and runs are written into the first.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 7860,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that other machines reach needs a password.")
    ] = "127.0.0.1",
    password_file: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="File with the password; by default SD3TUNE_UI_PASSWORD or a prompt."),
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Serve a local page to train, watch, try and share; everything it starts is a command that it prints."""
    from sd3tune.commands.ui import run_ui

    run_ui(folders or [Path()], host, port, password_file, browser)
