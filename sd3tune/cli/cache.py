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
    """What is no command is the configuration to encode for: `cache run.yaml` as well as `cache ls`."""

    fallback = "encode"

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else [self.fallback, *args])


cache_app = typer.Typer(
    cls=_ConfigOrCommand,
    help="Encode captions and images, so that training starts at once; see and prune what was encoded.",
    no_args_is_help=True,
    subcommand_metavar="CONFIG [KEY=VALUE]... | ls | prune",
)
StoreArgument = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Argument(metavar="[FOLDER|CONFIG]", help="The store, or a run that uses it; else the one used from here."),
]


@cache_app.command()
def encode(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Encode captions and images of a run, and nothing else; the word `encode` may be left out."""
    loaded = load_config(config, overrides or ())
    with quick_imports(f"cache {config}"):
        from sd3tune.commands.cache import run_cache

    run_cache(loaded.config, loaded.notes)


@cache_app.command()
def ls(where: StoreArgument = None) -> None:
    """Print what a store holds: entries, bytes, and when they were last used."""
    from sd3tune.commands.cache_store import list_store

    result(*list_store(where))


@cache_app.command()
def prune(
    where: StoreArgument = None,
    older_than: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="DAYS", min=0, help="Also entries that were not used for that long."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; the default is a dry run.")] = False,
) -> None:
    """Remove unfinished and unreadable files from a store, and what is older; never while a run uses it."""
    from sd3tune.commands.cache_store import prune_store

    result(*prune_store(where, older_than=older_than, everything=everything, yes=yes))
