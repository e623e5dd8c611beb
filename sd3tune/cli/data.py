"""`sd3tune data check`, `data convert`, `data caption` and `data mask`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.arguments import Overrides, print_notes
from sd3tune.reporting import result

data_app = typer.Typer(help="Check, convert, caption and mask training data.", no_args_is_help=True)

ImageColumn = Annotated[str, typer.Option(metavar="NAME", help="Image column of a dataset.")]
CaptionColumn = Annotated[str, typer.Option(metavar="NAME", help="Caption column of a dataset.")]
Caption = Annotated[
    Optional[str],  # noqa: UP045  typer reads the annotation at run time
    typer.Option(metavar="TEXT", help="Caption for images without their own."),
]
Photos = Annotated[Path, typer.Argument(metavar="DIR", help="A folder of photos.")]
Recursive = Annotated[bool, typer.Option("--recursive", help="Also read the subfolders.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be written; load no model.")]
Split = Annotated[str, typer.Option(metavar="NAME", help="Split of a dataset.")]


@data_app.command()
def check(
    what: Annotated[str, typer.Argument(metavar="DIR|CONFIG", help="A folder or dataset, or the YAML file of a run.")],
    overrides: Overrides = None,
    sheet: Annotated[Path, typer.Option(metavar="FILE", help="Path of the contact sheet.")] = Path(
        "runs/data-check.png"
    ),
    caption: Caption = None,
) -> None:
    """Summarise the training data and its problems; exit code 2 if it cannot be trained on."""
    from sd3tune.commands.data_check import load_data, run_data_check

    loaded = load_data(what, overrides or (), caption)
    print_notes(loaded.notes)
    run_data_check(loaded.config, sheet)


@data_app.command()
def convert(
    what: Annotated[str, typer.Argument(metavar="IN", help="A folder of images, a .parquet file or a dataset.")],
    to: Annotated[str, typer.Option(metavar="FORM", help="sidecar, jsonl, csv or parquet.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="A new folder, or for parquet a new file.")],
    caption: Caption = None,
    split: Split = "train",
    image_column: ImageColumn = "image",
    caption_column: CaptionColumn = "text",
) -> None:
    """Copy images, captions and masks into another dataset format; image bytes do not change."""
    from sd3tune.commands.data_convert import run_data_convert

    columns = {"split": split, "image_column": image_column, "caption_column": caption_column}
    result(run_data_convert(what, to, out, caption, **columns))


@data_app.command()
def caption(
    folder: Photos,
    trigger: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="WORDS", help="Name of the subject, such as sks; captions begin with it."),
    ] = None,
    subject: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="CLASS", help="Class of the subject, such as dog, put behind the trigger."),
    ] = None,
    prompt: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TEXT", help="Instruction to the model. By default it describes everything but the subject."
        ),
    ] = None,
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HUB_ID|FOLDER", help="A vision-language model that transformers can load."),
    ] = None,
    recursive: Recursive = False,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="OUT", help="Folder for the caption files; by default beside the photos."),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="BASE", help="Base model whose CLIP counts the captions' tokens, if it is here."),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Write missing caption files with a vision-language model; existing captions are never overwritten."""
    from sd3tune.commands.data_caption import CaptionRequest, run_data_caption

    own = {} if base is None else {"base": base}
    request = CaptionRequest(folder, model, trigger, subject, prompt, recursive, out, **own)
    run_data_caption(request, dry_run)


@data_app.command()
def mask(
    folder: Photos,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="The subject in words, such as dog.")],
    model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="HUB_ID|FOLDER", help="A CLIPSeg model."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(metavar="P", help="Probability from which on a place belongs to the subject.")
    ] = 0.4,
    recursive: Recursive = False,
    sheet: Annotated[Path, typer.Option(metavar="FILE", help="Path of the contact sheet.")] = Path(
        "runs/data-mask.png"
    ),
    dry_run: DryRun = False,
) -> None:
    """Write missing masks (white: the subject) with a segmentation model; existing masks are never overwritten."""
    from sd3tune.commands.data_mask import MaskRequest, run_data_mask

    run_data_mask(MaskRequest(folder, prompt, model, threshold, recursive, sheet), dry_run)
