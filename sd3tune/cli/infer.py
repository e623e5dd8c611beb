"""`sd3tune infer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.imports import quick_imports
from sd3tune.errors import ConfigError

_MODEL, _SAMPLING, _TEXT = "Adapters and model", "Sampling", "Text"


def infer(
    prompt: Annotated[
        Optional[str],  # noqa: UP045  typer reads the annotation at run time
        typer.Option(help="What to draw."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the images.")] = Path("images"),
    negative: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="What to steer away from."),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Seed of the first image (0); the next has seed + 1."),
    ] = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Denoising steps (28).", rich_help_panel=_SAMPLING),
    ] = None,
    guidance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Classifier-free guidance (7); 1 or less turns it off.", rich_help_panel=_SAMPLING),
    ] = None,
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIDE|WxH", help="Pixels; by default what adapter or model was trained at."),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE", help="A .jsonl or .csv file, a picture a line; what is already in --out is not drawn again."
        ),
    ] = None,
    grid: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="NAME=V,V,...",
            help="One picture of all values, such as weight=0,0.5,1; a second --grid is for the rows. "
            "Also seed, prompt (a|b), lora, steps, guidance, sampler and shift.",
        ),
    ] = None,
    from_picture: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--from", metavar="PNG", help="A picture of infer: drawn again from its recipe; flags override it."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(help="How many to draw at once.")] = 1,
    sampler: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="euler (as the base was made for), heun or dpmpp.", rich_help_panel=_SAMPLING),
    ] = None,
    shift: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Of the noise levels; by default the base's own. More is more noise.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    num: Annotated[int, typer.Option(help="How many images.")] = 1,
    before: Annotated[bool, typer.Option(help="Also draw without the adapter, for a before/after picture.")] = True,
    lora: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="PATH|USER/NAME[:REVISION][@WEIGHT]",
            help="An adapter: file, adapter folder, checkpoint, run, or a repository on the Hub. Repeatable.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Base model; by default the one that the adapter names.", rich_help_panel=_MODEL),
    ] = None,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="YAML",
            help="Its model section says where base, text encoders and tokenizers are.",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    t5_tokens: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            metavar="N", help="T5's length; by default what adapter or model was trained with.", rich_help_panel=_TEXT
        ),
    ] = None,
    t5: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(help="Whether T5 reads the prompt; by default as in training.", rich_help_panel=_TEXT),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.", rich_help_panel=_MODEL)] = "auto",
) -> None:
    """Draw images with one or several adapters, under the conditioning they were trained with."""
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"--dtype {dtype}: one of auto, fp32, bf16, fp16")
    wide_high = parse_size(size)
    with quick_imports():
        from sd3tune.jobs.infer import run_infer
        from sd3tune.jobs.request import Request

    request = Request(
        loras=lora or [],
        prompt=prompt,
        out=out,
        negative=negative,
        seed=seed,
        steps=steps,
        guidance=guidance,
        size=wide_high,
        prompts=prompts,
        grid=grid or [],
        from_picture=from_picture,
        batch=batch,
        sampler=sampler,
        shift=shift,
        num=num,
        base=base,
        config=config,
        t5_tokens=t5_tokens,
        t5=t5,
        dtype=dtype,
        before=before,
    )
    for path in run_infer(request):
        print(path)


def parse_size(size: str | None) -> tuple[int, int] | None:
    """`512` or `1152x896` -> (width, height). Raises ConfigError."""
    if size is None:
        return None
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--size {size}: write a side such as 1024, or WIDTHxHEIGHT such as 1152x896")
    return int(sides[0]), int(sides[-1])
