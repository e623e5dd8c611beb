"""`sd3tune data check` and `sd3tune data convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.arguments import Overrides, print_notes
from sd3tune.reporting import result

data_app = typer.Typer(help="Check and convert training data.", no_args_is_help=True)

ImageColumn = Annotated[str, typer.Option(metavar="NAME", help="Image column of a dataset.")]
CaptionColumn = Annotated[str, typer.Option(metavar="NAME", help="Caption column of a dataset.")]
Caption = Annotated[
    Optional[str],  # noqa: UP045  typer reads the annotation at run time
    typer.Option(metavar="TEXT", help="Caption for images without their own."),
]
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
