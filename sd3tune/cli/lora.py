"""`sd3tune lora ...`: commands for adapter files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.adapter.layouts import forms
from sd3tune.cli.imports import quick_imports
from sd3tune.errors import ConfigError
from sd3tune.reporting import result

lora_app = typer.Typer(help="Inspect, convert, verify, merge, resize and extract adapters.", no_args_is_help=True)

Adapter = Annotated[Path, typer.Argument(metavar="PATH", help="A file, adapter folder, checkpoint or run.")]
*_first, _last = forms()
Form = Annotated[str, typer.Option(metavar="FORM", help=f"{', '.join(_first)} or {_last}.")]
Out = Annotated[Path, typer.Option(metavar="OUT", help="A new .safetensors file.")]
Base = Annotated[
    Optional[str],  # noqa: UP045  typer reads the annotation at run time
    typer.Option(metavar="BASE", help="Base model; by default the base named by the adapter."),
]
Rank = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(metavar="R", help="Maximum rank of each module."),
]

TransformerOnly = Annotated[bool, typer.Option("--transformer-only", help="Ignore tensors for the text encoders.")]


@lora_app.command()
def inspect(path: Adapter) -> None:
    """Show an adapter's layout, base, ranks, modules, norms and inference settings, and its problems."""
    with quick_imports(f"lora inspect {path}"):
        from sd3tune.commands.lora_inspect import inspect_lora

    for line in inspect_lora(path):
        result(line)


@lora_app.command()
def convert(
    path: Adapter,
    to: Form,
    out: Out,
    transformer_only: TransformerOnly = False,
    thumbnail: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="PICTURE", help="Thumbnail for UIs; by default the run's last preview, if there is one."),
    ] = None,
    no_thumbnail: Annotated[bool, typer.Option("--no-thumbnail", help="Store no thumbnail in the file.")] = False,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(metavar="R", help="Write the nearest LoRA of this rank; for DoRA, LoHa and LoKr."),
    ] = None,
    base: Base = None,
) -> None:
    """Write an adapter in another tool's layout; its output does not change, except with --rank."""
    if thumbnail is not None and no_thumbnail:
        raise ConfigError(f"--thumbnail {thumbnail}: not with --no-thumbnail; leave one of the two out")
    with quick_imports(f"lora convert {path}"):
        from sd3tune.commands.lora_convert import convert_lora

    for line in convert_lora(
        path, to, out, thumbnail, not no_thumbnail, transformer_only=transformer_only, rank=rank, base=base
    ):
        result(line)


@lora_app.command()
def verify(
    path: Adapter,
    base: Base = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.")] = "auto",
    preview: Annotated[
        bool, typer.Option("--preview/--no-preview", help="Draw a preview of the run again, and compare.")
    ] = True,
    transformer_only: TransformerOnly = False,
) -> None:
    """Load an adapter into a fresh diffusers pipeline; exit code 2 unless all of it loads and draws as in training."""
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"--dtype {dtype}: one of auto, fp32, bf16, fp16")
    with quick_imports(f"lora verify {path}"):
        from sd3tune.commands.lora_verify import verify_lora

    for line in verify_lora(path, base, dtype, preview, transformer_only=transformer_only):
        result(line)


@lora_app.command()
def merge(
    paths: Annotated[list[str], typer.Argument(metavar="PATH[@WEIGHT]...", help="Adapters, as for infer --lora.")],
    out: Annotated[
        Path, typer.Option(metavar="OUT", help="A new .safetensors file, or with --into-base a new folder.")
    ],
    to: Form = "diffusers",
    method: Annotated[
        str, typer.Option(help="concat (exact; ranks add up) or svd (the nearest of --rank).")
    ] = "concat",
    rank: Rank = None,
    into_base: Annotated[
        bool, typer.Option("--into-base", help="Write the whole base with the adapters merged in.")
    ] = False,
    base: Base = None,
    transformer_only: TransformerOnly = False,
) -> None:
    """Merge adapters into one adapter, or into the weights of their base."""
    if into_base and (to != "diffusers" or method != "concat" or rank is not None):
        raise ConfigError("--into-base: writes a whole model; leave --to, --method and --rank out")
    if base is not None and not into_base:
        raise ConfigError(f"--base {base}: only with --into-base; an adapter is merged without its base")
    with quick_imports("lora merge"):
        from sd3tune.commands.lora_merge import merge_into_base, merge_loras

    if into_base:
        lines = merge_into_base(paths, out, base, transformer_only=transformer_only)
    else:
        lines = merge_loras(paths, out, to, method, rank, transformer_only=transformer_only)
    for line in lines:
        result(line)


@lora_app.command()
def resize(
    path: Adapter,
    out: Out,
    rank: Rank = None,
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="E", help="Keep this share of each module's squared norm, such as 0.99."),
    ] = None,
    transformer_only: TransformerOnly = False,
) -> None:
    """Write the nearest adapter of a lower rank, and print the approximation error."""
    with quick_imports(f"lora resize {path}"):
        from sd3tune.commands.lora_resize import resize_lora

    for line in resize_lora(path, out, rank, energy, transformer_only=transformer_only):
        result(line)


@lora_app.command()
def extract(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before: a folder, a file or a Hub id.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The model after, of the same shape.")],
    rank: Annotated[int, typer.Option(metavar="R", help="Maximum rank of each module.")],
    out: Out,
    to: Form = "diffusers",
) -> None:
    """Write the difference of two models as a LoRA, and print the approximation error."""
    with quick_imports(f"lora extract {tuned}"):
        from sd3tune.commands.lora_extract import extract_lora

    for line in extract_lora(base, tuned, rank, out, to):
        result(line)
