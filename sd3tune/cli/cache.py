"""`sd3tune cache CONFIG`, `cache ls` and `cache prune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from typer.core import TyperGroup

from sd3tune.cli.arguments import ConfigArgument, Overrides
from sd3tune.cli.imports import quick_imports
from sd3tune.config import load_config
from sd3tune.reporting import result


class _ConfigOrCommand(TyperGroup):
    """Treat a word that is not a command as the configuration: `cache run.yaml` works like `cache encode run.yaml`."""

    fallback = "encode"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else [self.fallback, *args])


cache_app = typer.Typer(
    cls=_ConfigOrCommand,
    help="Encode captions and images, so that training starts immediately; list and prune encodings.",
    no_args_is_help=True,
    subcommand_metavar="CONFIG [KEY=VALUE]... | ls | prune",
)
StoreArgument = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(
        metavar="[FOLDER|CONFIG]", help="A store, or the YAML file of a run; by default the store of runs started here."
    ),
]


@cache_app.command()
def encode(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Only encode the captions and images of a run; the word `encode` may be left out."""
    loaded = load_config(config, overrides or ())
    with quick_imports(f"cache {config}"):
        from sd3tune.commands.cache import run_cache

    run_cache(loaded.config, loaded.notes)


@cache_app.command()
def ls(where: StoreArgument = None) -> None:
    """List the contents of a store: entries, bytes, and when they were last used."""
    from sd3tune.commands.cache_store import list_store

    result(*list_store(where))


@cache_app.command()
def prune(
    where: StoreArgument = None,
    older_than: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="DAYS", min=0, help="Also remove entries unused for this many days."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; the default is a dry run.")] = False,
) -> None:
    """Remove unfinished and unreadable files, and optionally unused entries; refuses while a run uses the store."""
    from sd3tune.commands.cache_store import prune_store

    result(*prune_store(where, older_than=older_than, everything=everything, yes=yes))
