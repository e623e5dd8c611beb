"""`sd3tune infer` as it was asked for, and what of it is wrong before anything is opened."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sd3tune.errors import AdapterError, ConfigError
from sd3tune.inference.image_request import Shot, problems_of
from sd3tune.model.load.quantized import FORMS, missing_library

MOST_T5_TOKENS = 512
"""As in diffusers; SD3 was trained with fewer."""
MOST_IMAGES = 100_000
"""Of one call for each prompt."""


@dataclass(frozen=True)
class Memory:
    """How a base is held: what saves memory or time, at a price in the other or in exactness."""

    quantize: str | None = None
    """Of the transformer's blocks: a key of `quantized.FORMS`, or `none`; None leaves it to the adapter's contract."""
    t5_8bit: bool | None = None
    """None leaves it to the adapter's contract."""
    offload: bool = False
    """Whether the transformer and the VAE leave the device while the other one works."""
    vae_tiling: bool = False
    compiled: bool = False
    """Whether the transformer's blocks go through `torch.compile`."""


IN_FULL = Memory()


@dataclass(frozen=True)
class Request:
    """The command line; None leaves it to the adapter's contract, to the model, or to `Shot`."""

    loras: Sequence[str]
    """`PATH` or `user/name[:revision]`, each with `@weight` if it is not 1."""
    prompt: str | None
    out: Path
    negative: str | None = None
    seed: int | None = None
    """Of the first image; the next has one more."""
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    """(width, height) in pixels."""
    prompts: Path | None = None
    """A file of prompts; what stands in it wins over the flags."""
    batch: int = 1
    grid: Sequence[str] = ()
    """Up to two of `NAME=VALUE,VALUE,...`; see `grid.AXES`."""
    from_picture: Path | None = None
    """Whose recipe says what nothing here says."""
    look_in: Sequence[Path] = ()
    """More folders for the adapters and pictures that the recipe names."""
    allow_download: bool = False
    """Whether to fetch what is not on this machine when a recipe may have named it."""
    sampler: str | None = None
    shift: float | None = None
    noise_offset: float | None = None
    slg: float | None = None
    slg_layers: tuple[int, ...] | None = None
    slg_start: float | None = None
    slg_stop: float | None = None
    image: Path | None = None
    strength: float | None = None
    prompt_clip_l: str | None = None
    prompt_clip_g: str | None = None
    prompt_t5: str | None = None
    num: int = 1
    transformer_only: bool = False
    """Whether to ignore the adapters' tensors for the text encoders."""
    base: str | None = None
    revision: str | None = None
    """Of a base on the Hub."""
    config: Path | None = None
    """A YAML whose `model` section says where the base, text encoders and tokenizers are; `base` wins over its base."""
    t5_tokens: int | None = None
    t5: bool | None = None
    """Whether T5 reads the prompts; without it, its part of the conditioning is zeros."""
    dtype: str = "auto"
    memory: Memory = IN_FULL
    before: bool = True
    """Whether the untrained base is drawn too, for the picture of both."""

    @property
    def of_the_shot(self) -> dict[str, Any]:
        """What was given of what a single picture is made from."""
        named = {field.name for field in fields(Shot)} & {field.name for field in fields(self)}
        return {name: getattr(self, name) for name in named if getattr(self, name) is not None}


def check_request(request: Request) -> None:
    """Raises ConfigError with every problem of the flags themselves."""
    problems = []
    varied = {axis.partition("=")[0] for axis in request.grid}
    if not request.loras and request.base is None and request.config is None and "lora" not in varied:
        problems.append("give --lora PATH, or --base (or --config) to draw with a base model alone")
    if request.grid and (request.prompts is not None or request.num != 1):
        flag = "--num" if request.prompts is None else "--prompts"
        problems.append(f"{flag}: not with --grid, whose axes say what is drawn; for several seeds seed=0,1,2")
    if request.prompt is None and request.prompts is None and "prompt" not in varied:
        problems.append("give --prompt, the text to draw; or a file of them with --prompts, or a picture with --from")
    if request.prompt is not None and request.prompts is not None:
        problems.append("--prompt: each line of --prompts has its own; leave one of the two out")
    for flag, value in (("--num", request.num), ("--batch", request.batch)):
        if not 1 <= value <= MOST_IMAGES:
            problems.append(f"{flag} {value}: " + ("at least 1" if value < 1 else f"at most {MOST_IMAGES}"))
    problems += _memory_problems(request.memory)
    if request.t5_tokens is not None and not 1 <= request.t5_tokens <= MOST_T5_TOKENS:
        problems.append(f"--t5-tokens {request.t5_tokens}: from 1 to {MOST_T5_TOKENS}")
    if request.strength is not None and request.image is None and request.prompts is None:
        problems.append(f"--strength {request.strength:g}: how much of --image is drawn anew; give --image, too")
    problems += problems_of(Shot(**request.of_the_shot), flag_of)
    if problems:
        raise ConfigError(*problems)


def _memory_problems(memory: Memory) -> list[str]:
    problems = []
    forms = (*FORMS, "none")
    if memory.quantize is not None and memory.quantize not in forms:
        problems.append(f"--quantize {memory.quantize}: one of {', '.join(forms)}")
    elif memory.quantize == "int8" and memory.offload:
        problems.append("--offload: layers of --quantize int8 stay on their device; take nf4, or one of the two")
    for flag, given in (("--quantize", memory.quantize not in (None, "none")), ("--t5-8bit", memory.t5_8bit)):
        if given and not problems:
            problems += missing_library(flag)
    return problems


def flag_of(field: str) -> str:
    """What a part of a shot is called on the command line."""
    return f"--{field.replace('_', '-')}"


def parse_lora(value: str, flag: str = "--lora ") -> tuple[Path, float]:
    """`PATH`, `user/name:revision` or either with `@weight` -> that, and the weight (1 when not given).

    Raises AdapterError.
    """
    path, at, weight = value.rpartition("@")
    if not at or Path(value).exists():
        _check_colon(value, flag)
        return Path(value), 1.0
    try:
        scale = float(weight)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise AdapterError(
            f"{flag}{value}: {weight!r} is not a weight; write PATH@0.8, or for a revision user/name:revision"
        )
    _check_colon(path, flag)
    return Path(path), scale


def _check_colon(value: str, flag: str) -> None:
    """Raises AdapterError for `PATH:0.8`, as other tools write a weight; a file or folder of this machine has none."""
    path, colon, weight = value.rpartition(":")
    if colon and path and Path(path).exists() and not Path(value).exists():
        is_weight = re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", weight) is not None
        way_out = f"write {path}@{weight}" if is_weight else f"write {path}; only a Hub repository has revisions"
        raise AdapterError(f"{flag}{value}: {way_out}")
