"""What a single picture is made from, besides the base and the precision, and what can be wrong with that."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3tune.files.text import flaw
from sd3tune.model.base.contract import EARLIER_GUIDANCE, EARLIER_STEPS
from sd3tune.sampling.sampler import SamplerSettings, SkipLayers
from sd3tune.sampling.samplers import SAMPLERS

MOST_STEPS = 10_000
"""Ten times as many as SD3 was trained with noise levels."""
_TEXTS = ("prompt", "negative", "prompt_clip_l", "prompt_clip_g", "prompt_t5", "name")


@dataclass(frozen=True)
class Texts:
    """A prompt, and what single encoders read instead."""

    prompt: str
    clip_l: str | None = None
    clip_g: str | None = None
    t5: str | None = None

    def read_by(self, encoder: str) -> str:
        own: str | None = getattr(self, encoder)
        return self.prompt if own is None else own


@dataclass(frozen=True)
class Shot:
    """One picture. Flags, lines of a file, recipes and places in a grid each give some of it; the rest stands here."""

    prompt: str = ""
    negative: str = ""
    seed: int = 0
    steps: int = EARLIER_STEPS
    guidance: float = EARLIER_GUIDANCE
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None before it is known what adapter or model was trained at."""
    loras: tuple[tuple[int, float], ...] = ()
    """Adapters in use: the number of each in the call's list, and its weight. None: the base alone."""
    sampler: str = "euler"
    shift: float | None = None
    """Of the noise levels; None is the base's own."""
    noise_offset: float = 0.0
    """Of the starting noise; see `sampler.add_offset`."""
    slg: float | None = None
    """Scale of skip-layer guidance, with the blocks that are left out, and from where to where."""
    slg_layers: tuple[int, ...] = (7, 8, 9)
    slg_start: float = 0.01
    slg_stop: float = 0.2
    image: Path | None = None
    """The picture to start from; it is scaled and cut to `size`."""
    strength: float = 0.6
    prompt_clip_l: str | None = None
    """What this encoder reads instead of `prompt`."""
    prompt_clip_g: str | None = None
    prompt_t5: str | None = None
    name: str | None = None
    """Of the file, without its ending; None makes one of prompt and seed."""

    @property
    def stem(self) -> str:
        """What its file is called, but for the ending."""
        if self.name is not None:
            return self.name
        words = re.sub(r"[^a-z0-9]+", "-", self.prompt.lower()).strip("-")[:60]
        return f"{words or 'image'}-seed{self.seed}"

    @property
    def sampler_settings(self) -> SamplerSettings:
        if self.size is None:
            raise ValueError("the size is not settled")
        width, height = self.size
        skip = None if self.slg is None else SkipLayers(self.slg, self.slg_layers, self.slg_start, self.slg_stop)
        strength = None if self.image is None else self.strength
        return SamplerSettings(
            self.steps, self.guidance, height, width, self.sampler, self.shift, strength, skip, self.noise_offset
        )

    @property
    def texts(self) -> Texts:
        return Texts(self.prompt, self.prompt_clip_l, self.prompt_clip_g, self.prompt_t5)


def problems_of(shot: Shot, named: Callable[[str], str]) -> list[str]:
    """Return a line for each value that cannot be, whatever the others are.

    `named` is what a field is called where it was given.
    """
    problems = []
    for field in _TEXTS:
        wrong = flaw(getattr(shot, field) or "")
        problems += [f"{named(field)}: {wrong}"] if wrong else []
    if not 1 <= shot.steps <= MOST_STEPS:
        problems.append(
            f"{named('steps')} {shot.steps}: " + ("at least 1" if shot.steps < 1 else f"at most {MOST_STEPS}")
        )
    if not 0 <= shot.seed < 2**63:
        problems.append(f"{named('seed')} {shot.seed}: at least 0, and below 2^63")
    if not math.isfinite(shot.guidance):
        problems.append(f"{named('guidance')} {shot.guidance}: a finite number")
    if shot.size and (shot.size[0] % 16 or shot.size[1] % 16 or min(shot.size) < 16):
        problems.append(f"{named('size')} {shot.size[0]}x{shot.size[1]}: both sides must be multiples of 16")
    if shot.sampler not in SAMPLERS:
        problems.append(f"{named('sampler')} {shot.sampler}: one of {', '.join(SAMPLERS)}")
    if shot.shift is not None and not 0 < shot.shift < math.inf:
        problems.append(f"{named('shift')} {shot.shift:g}: a number above 0; SD3's own is 3")
    if not 0 <= shot.noise_offset <= 1:
        problems.append(f"{named('noise_offset')} {shot.noise_offset:g}: from 0 to 1; 0 is none")
    if not 0 < shot.strength <= 1:
        problems.append(f"{named('strength')} {shot.strength:g}: above 0, and at most 1")
    if shot.slg is not None and not math.isfinite(shot.slg):
        problems.append(f"{named('slg')} {shot.slg}: a finite number")
    if not shot.slg_layers or min(shot.slg_layers) < 0:
        problems.append(f"{named('slg_layers')}: numbers of blocks from 0 on, such as 7,8,9")
    if not 0 <= shot.slg_start < shot.slg_stop <= 1:
        start, stop = f"{named('slg_start')} {shot.slg_start:g}", f"{named('slg_stop')} {shot.slg_stop:g}"
        problems.append(f"{start}, {stop}: shares of the steps, the first below the second, from 0 to 1")
    return problems


def conflicts_of(shot: Shot, named: Callable[[str], str]) -> list[str]:
    """Return a line for each value that does not go with the settled steps or guidance."""
    problems = []
    if shot.image is not None and shot.steps * shot.strength < 1 <= shot.steps:
        least = math.ceil(1000 / shot.steps) / 1000
        problems.append(f"{named('strength')} {shot.strength:g}: no step of {shot.steps} is left; at least {least:g}")
    if shot.slg is not None and shot.guidance <= 1:
        problems.append(f"{named('slg')} {shot.slg:g}: works beside guidance; it is {shot.guidance:g}, give it above 1")
    return problems


def beyond_the_base(shot: Shot, named: Callable[[str], str], transformer: Any) -> list[str]:
    """A line for each value that a base of this transformer config cannot do."""
    problems = []
    largest = transformer.pos_embed_max_size * transformer.patch_size * 8
    if shot.size and max(shot.size) > largest:
        size = f"{shot.size[0]}x{shot.size[1]}"
        problems.append(f"{named('size')} {size}: this base draws at most {largest} pixels a side")
    if shot.slg is not None and max(shot.slg_layers, default=0) >= transformer.num_layers:
        layers = ",".join(map(str, shot.slg_layers))
        problems.append(f"{named('slg_layers')} {layers}: this base has the blocks 0 to {transformer.num_layers - 1}")
    return problems


def seeded(shot: Shot, count: int) -> list[Shot]:
    """`count` pictures whose seeds follow one another."""
    return [replace(shot, seed=shot.seed + number) for number in range(count)]


def batched(shots: Iterable[Shot], most: int) -> list[list[Shot]]:
    """The shots in groups that can be drawn at once: alike in adapters and settings, at most `most` in one."""
    alike: dict[tuple[object, ...], list[Shot]] = {}
    for shot in shots:
        alike.setdefault((shot.loras, shot.sampler_settings), []).append(shot)
    return [group[start : start + most] for group in alike.values() for start in range(0, len(group), most)]


def texts_of(shots: Sequence[Shot]) -> list[Texts]:
    """Everything that is to be read, once."""
    return list(dict.fromkeys(texts for shot in shots for texts in (shot.texts, Texts(shot.negative))))
