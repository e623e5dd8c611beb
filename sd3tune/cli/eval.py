"""`sd3tune eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.completion import complete_run
from sd3tune.cli.imports import quick_imports
from sd3tune.errors import ConfigError
from sd3tune.evaluation.request import CHECKPOINTS, KINDS, PROTOCOLS, EvalRequest, read_encoders

_DRAWING, _MEASURING = "Drawing", "Measuring"


def evaluate(
    target: Annotated[
        Optional[str],  # noqa: UP045  typer reads the annotation at run time
        typer.Argument(
            metavar="RUN|ADAPTER|FOLDER",
            help="A run; an adapter, as for infer --lora; a model; or a folder of pictures.",
            autocompletion=complete_run,
        ),
    ] = None,
    checkpoints: Annotated[
        str, typer.Option(metavar="|".join(CHECKPOINTS), help="Which weights of a run: the final ones, or all.")
    ] = "last",
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder for pictures and figures; by default RUN/eval, or eval/NAME."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print how much there is to draw.")
    ] = False,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="A prompt file, as for infer; by default prompts for the subject of the run.",
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="|".join(PROTOCOLS),
            help="dreambooth: the 25 prompts and the encoders of the DreamBooth paper.",
            rich_help_panel=_DRAWING,
        ),
    ] = "default",
    kind: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="|".join(KINDS),
            help="The kind of subject for --protocol dreambooth; by default as its class has it.",
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    class_word: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--class",
            metavar="WORD",
            help="Class of the subject, such as dog; by default from the prior's prompt.",
            rich_help_panel=_DRAWING,
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(metavar="N", help="Pictures of each prompt.", rich_help_panel=_DRAWING)] = 4,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="N", help="Denoising steps; by default as infer.", rich_help_panel=_DRAWING),
    ] = None,
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIDE|WxH", help="Pixels; by default the training resolution.", rich_help_panel=_DRAWING),
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", help="How many to draw at once.", rich_help_panel=_DRAWING)] = 1,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="BASE", help="Base model; by default the one that the adapter names.", rich_help_panel=_DRAWING
        ),
    ] = None,
    num_processes: Annotated[
        int, typer.Option(min=1, help="Processes that draw, one per GPU.", rich_help_panel=_DRAWING)
    ] = 1,
    photos: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="DIR",
            help="Photos to compare with; by default those of the training.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    encoder: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME=SOURCE",
            help="Take an encoder from a local folder or another Hub id; none leaves it out. Repeatable.",
            rich_help_panel=_MEASURING,
        ),
    ] = None,
    fid: Annotated[
        Optional[tuple[Path, Path]],  # noqa: UP045
        typer.Option(
            metavar="A B", help="Only compare two folders of pictures, by FID and KID.", rich_help_panel=_MEASURING
        ),
    ] = None,
) -> None:
    """Measure a training: likeness, prompts, diversity, memorisation and drift, and which checkpoint is best."""
    encoders = read_encoders(encoder or ())
    if fid is not None:
        if target is not None:
            raise ConfigError(f"--fid: compares two folders alone; leave {target} out")
        with quick_imports("eval --fid"):
            from sd3tune.commands.eval import run_distances

        run_distances(*fid, encoders)
        return
    if target is None:
        raise ConfigError("give a run, an adapter or a folder of pictures; or --fid A B")
    request = EvalRequest(
        target, checkpoints, prompts, protocol, kind, class_word, seeds, photos, out, base, steps, size, batch, encoders
    )
    request.check()
    if num_processes > 1:
        from sd3tune.runtime.launch import relaunch

        relaunch(num_processes, sys.argv[1:])
    with quick_imports(f"eval {target}"):
        from sd3tune.commands.eval import run_eval

    run_eval(request, dry_run=dry_run)
