"""`sd3tune infer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune.cli.imports import quick_imports
from sd3tune.errors import ConfigError
from sd3tune.reporting import result

_MODEL, _SAMPLING, _TEXT = "Adapters and model", "Sampling", "Text"
_IMAGE, _MEMORY = "From a picture", "Memory"


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
        typer.Option(
            help="Denoising steps; by default those of the training's previews, or 28.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    guidance: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Classifier-free guidance; by default that of the training's previews, or 7. 1 or less turns it off.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    size: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="SIDE|WxH", help="Pixels; by default what adapter or model was trained at."),
    ] = None,
    prompts: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="A .txt file, a prompt a line; or .jsonl or .csv. What is already in --out is not drawn again.",
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
    look_in: Annotated[
        Optional[list[Path]],  # noqa: UP045
        typer.Option(metavar="DIR", help="With --from: a folder with the adapter or the start image. Repeatable."),
    ] = None,
    allow_download: Annotated[
        bool,
        typer.Option("--allow-download", help="With --from: fetch from the Hub what is not on this machine."),
    ] = False,
    batch: Annotated[int, typer.Option(help="How many to draw at once.")] = 1,
    sampler: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="euler (as the base was made for), heun or dpmpp.", rich_help_panel=_SAMPLING),
    ] = None,
    shift: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Of the noise levels; by default the base's own. Higher means noisier.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    noise_offset: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            metavar="STRENGTH",
            help="Of the starting noise; by default as in training. 0 is none.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    slg: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="SCALE", help="Skip-layer guidance, for SD3.5 medium: 2.8.", rich_help_panel=_SAMPLING),
    ] = None,
    slg_layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="N,N,...", help="The blocks that are left out (7,8,9).", rich_help_panel=_SAMPLING),
    ] = None,
    slg_start: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="From which share of the steps (0.01).", rich_help_panel=_SAMPLING),
    ] = None,
    slg_stop: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="To which share of the steps (0.2).", rich_help_panel=_SAMPLING),
    ] = None,
    image: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="A picture to start from, scaled and cut to the size.", rich_help_panel=_IMAGE),
    ] = None,
    strength: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="How much of it is drawn anew (0.6): 1 is all.", rich_help_panel=_IMAGE),
    ] = None,
    prompt_clip_l: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TEXT", help="What CLIP-L reads instead of the prompt.", rich_help_panel=_TEXT),
    ] = None,
    prompt_clip_g: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TEXT", help="What CLIP-G reads instead of the prompt.", rich_help_panel=_TEXT),
    ] = None,
    prompt_t5: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="TEXT", help="What T5 reads instead of the prompt.", rich_help_panel=_TEXT),
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
    transformer_only: Annotated[
        bool,
        typer.Option(
            "--transformer-only", help="Ignore a file's tensors for the text encoders.", rich_help_panel=_MODEL
        ),
    ] = False,
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
    quantize: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FORM",
            help="Hold the transformer's blocks as nf4, int8 or none; by default as in training.",
            rich_help_panel=_MEMORY,
        ),
    ] = None,
    t5_8bit: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--t5-8bit/--no-t5-8bit", help="Hold T5 in 8 bits; by default as in training.", rich_help_panel=_MEMORY
        ),
    ] = None,
    offload: Annotated[
        bool, typer.Option("--offload", help="Offload idle components to the CPU.", rich_help_panel=_MEMORY)
    ] = False,
    vae_tiling: Annotated[
        bool, typer.Option("--vae-tiling", help="Decode large pictures in tiles.", rich_help_panel=_MEMORY)
    ] = False,
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="Compile the transformer first, for many pictures.", rich_help_panel=_MODEL),
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16.", rich_help_panel=_MODEL)] = "auto",
) -> None:
    """Draw images with one or several adapters, with the settings they were trained with."""
    if dtype not in ("auto", "fp32", "bf16", "fp16"):
        raise ConfigError(f"--dtype {dtype}: one of auto, fp32, bf16, fp16")
    wide_high = parse_size(size)
    with quick_imports("infer"):
        from sd3tune.commands.infer import run_infer
        from sd3tune.inference.request import Memory, Request

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
        look_in=look_in or [],
        allow_download=allow_download,
        batch=batch,
        sampler=sampler,
        shift=shift,
        noise_offset=noise_offset,
        slg=slg,
        slg_layers=parse_layers(slg_layers),
        slg_start=slg_start,
        slg_stop=slg_stop,
        image=image,
        strength=strength,
        prompt_clip_l=prompt_clip_l,
        prompt_clip_g=prompt_clip_g,
        prompt_t5=prompt_t5,
        num=num,
        transformer_only=transformer_only,
        base=base,
        config=config,
        t5_tokens=t5_tokens,
        t5=t5,
        dtype=dtype,
        memory=Memory(quantize, t5_8bit, offload, vae_tiling, compiled),
        before=before,
    )
    for path in run_infer(request):
        result(path)


def parse_size(size: str | None) -> tuple[int, int] | None:
    """`512` or `1152x896` -> (width, height). Raises ConfigError."""
    if size is None:
        return None
    sides = size.lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() for side in sides):
        raise ConfigError(f"--size {size}: write a side such as 1024, or WIDTHxHEIGHT such as 1152x896")
    return int(sides[0]), int(sides[-1])


def parse_layers(layers: str | None) -> tuple[int, ...] | None:
    """`7,8,9` -> (7, 8, 9). Raises ConfigError."""
    if layers is None:
        return None
    numbers = [number.strip() for number in layers.split(",")]
    if not all(number.isascii() and number.isdecimal() for number in numbers):
        raise ConfigError(f"--slg-layers {layers}: numbers of blocks, such as 7,8,9")
    return tuple(map(int, numbers))
