"""The request for one image: everything it depends on besides the base, the adapters' files and the precision.

Each field is declared here once. `parameters` lists the properties of a declaration and the views derived from it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3tune.inference.parameters import (
    IMAGE,
    SAMPLING,
    TEXT,
    parameter,
    parameters_of,
    read_file_name,
    read_layers,
    read_size,
)
from sd3tune.model.base.contract import EARLIER_GUIDANCE, EARLIER_STEPS

MOST_STEPS = 10_000
"""Ten times the number of timesteps that SD3 was trained with."""
PROMPT_OF = {"clip_l": "prompt_clip_l", "clip_g": "prompt_clip_g", "t5": "prompt_t5"}
"""Encoder -> the field with the text that replaces the prompt for it."""


def _steps(value: int) -> str | None:
    if 1 <= value <= MOST_STEPS:
        return None
    return "at least 1" if value < 1 else f"at most {MOST_STEPS}"


def _seed(value: int) -> str | None:
    return None if 0 <= value < 2**63 else "at least 0, and below 2^63"


def _finite(value: float | None) -> str | None:
    return None if value is None or math.isfinite(value) else "a finite number"


def _size(value: tuple[int, int] | None) -> str | None:
    good = value is None or not (value[0] % 16 or value[1] % 16 or min(value) < 16)
    return None if good else "both sides must be multiples of 16"


def _sampler(value: str) -> str | None:
    from sd3tune.sampling.samplers import SAMPLERS  # here, as it imports diffusers, which would slow down --help

    return None if value in SAMPLERS else f"one of {', '.join(SAMPLERS)}"


def _shift(value: float | None) -> str | None:
    return None if value is None or 0 < value < math.inf else "a number above 0; SD3's own is 3"


def _noise_offset(value: float) -> str | None:
    return None if 0 <= value <= 1 else "from 0 to 1; 0 is none"


def _strength(value: float) -> str | None:
    return None if 0 < value <= 1 else "above 0, and at most 1"


def _layers(value: tuple[int, ...]) -> str | None:
    return None if value and min(value) >= 0 else "numbers of blocks from 0 on, such as 7,8,9"


def _own_text(encoder: str, recipe: str) -> Any:
    """Declare the text that replaces the prompt for an encoder."""
    help = f"What {encoder} reads instead of the prompt."
    return parameter(None, help, metavar="TEXT", panel=TEXT, column=True, recipe=recipe, optional=True)


@dataclass(frozen=True)
class Texts:
    """A prompt, and the texts that replace it for single encoders."""

    prompt: str
    clip_l: str | None = None
    clip_g: str | None = None
    t5: str | None = None

    def read_by(self, encoder: str) -> str:
        """Return the text for an encoder: its own, or else the prompt."""
        own: str | None = getattr(self, encoder)
        return self.prompt if own is None else own


@dataclass(frozen=True)
class ImageRequest:
    """One image to draw. Options, lines of a prompt file, recipes and cells of a grid each set some of the fields."""

    prompt: str = parameter("", "What to draw.", column=True, axis=True, recipe="prompt")
    negative: str = parameter("", "What to steer away from.", column=True, recipe="negative")
    seed: int = parameter(
        0,
        "Seed of the first image (0); the next has seed + 1.",
        column=True,
        axis=True,
        recipe="seed",
        check=_seed,
    )
    steps: int = parameter(
        EARLIER_STEPS,
        "Denoising steps; by default those of the training's previews, or 28.",
        panel=SAMPLING,
        column=True,
        axis=True,
        recipe="steps",
        check=_steps,
    )
    guidance: float = parameter(
        EARLIER_GUIDANCE,
        "Classifier-free guidance; by default that of the training's previews, or 7. 1 or less turns it off.",
        panel=SAMPLING,
        column=True,
        axis=True,
        recipe="guidance",
        check=_finite,
    )
    size: tuple[int, int] | None = parameter(
        None,
        "Pixels; by default the training resolution.",
        metavar="SIDE|WxH",
        column=True,
        recipe="size",
        read=read_size,
        check=_size,
    )
    """(width, height); None until the training size is known."""
    loras: tuple[tuple[int, float], ...] = ()
    """Active adapters, as (index in the session's adapters, weight). Empty: the base alone."""
    sampler: str = parameter(
        "euler",
        "euler (as the base was made for), heun or dpmpp.",
        panel=SAMPLING,
        column=True,
        axis=True,
        recipe="sampler",
        check=_sampler,
    )
    shift: float | None = parameter(
        None,
        "Shift of the noise schedule; by default the base's own. Higher means noisier.",
        panel=SAMPLING,
        column=True,
        axis=True,
        recipe="shift",
        check=_shift,
    )
    prompt_clip_l: str | None = _own_text("CLIP-L", recipe="prompt_clip_l")
    prompt_clip_g: str | None = _own_text("CLIP-G", recipe="prompt_clip_g")
    prompt_t5: str | None = _own_text("T5", recipe="prompt_t5")
    noise_offset: float = parameter(
        0.0,
        "Offset of the starting noise; by default as in training. 0 is none.",
        metavar="STRENGTH",
        panel=SAMPLING,
        column=True,
        recipe="noise_offset",
        optional=True,
        check=_noise_offset,
    )
    """See `sampler.add_offset`."""
    slg: float | None = parameter(
        None,
        "Scale of skip-layer guidance; for SD3.5 medium, use 2.8.",
        metavar="SCALE",
        panel=SAMPLING,
        column=True,
        axis=True,
        recipe="slg.scale",
        optional=True,
        check=_finite,
    )
    slg_layers: tuple[int, ...] = parameter(
        (7, 8, 9),
        "The skipped blocks (7,8,9).",
        metavar="N,N,...",
        panel=SAMPLING,
        recipe="slg.layers",
        requires="slg",
        read=read_layers,
        check=_layers,
    )
    slg_start: float = parameter(
        0.01,
        "Where skip-layer guidance starts, as a share of the steps (0.01).",
        panel=SAMPLING,
        recipe="slg.start",
        requires="slg",
    )
    slg_stop: float = parameter(
        0.2,
        "Where skip-layer guidance stops, as a share of the steps (0.2).",
        panel=SAMPLING,
        recipe="slg.stop",
        requires="slg",
    )
    image: Path | None = parameter(
        None,
        "A picture to start from, scaled and cut to the size.",
        panel=IMAGE,
        column=True,
        recipe="image",
        optional=True,
    )
    mask: Path | None = parameter(
        None,
        "A picture of the same shape as --image: white is redrawn, black is kept, grey blends.",
        panel=IMAGE,
        column=True,
        recipe="mask",
        optional=True,
    )
    strength: float = parameter(
        0.6,
        "Share of the start picture to redraw (0.6); 1 is all of it.",
        panel=IMAGE,
        column=True,
        axis=True,
        recipe="strength",
        requires="image",
        check=_strength,
    )
    name: str | None = parameter(None, column=True, read=read_file_name)
    """The file name without its extension; None derives one from prompt and seed."""

    @property
    def stem(self) -> str:
        """The file name without its extension."""
        if self.name is not None:
            return self.name
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60]
        return f"{words or 'image'}-seed{self.seed}"

    @property
    def texts(self) -> Texts:
        """The prompt, and the texts that replace it for single encoders."""
        return Texts(self.prompt, **{encoder: getattr(self, field) for encoder, field in PROMPT_OF.items()})


PARAMETERS = parameters_of(ImageRequest)


def seeded(request: ImageRequest, count: int) -> list[ImageRequest]:
    """Return `count` requests with consecutive seeds."""
    return [replace(request, seed=request.seed + number) for number in range(count)]
