"""What a single picture is made from, besides the base and the precision, and what can be wrong with that."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from sd3tune.sampling.sampler import SamplerSettings
from sd3tune.sampling.samplers import SAMPLERS


@dataclass(frozen=True)
class Shot:
    """One picture. Flags, lines of a file, recipes and places in a grid each give some of it; the rest stands here."""

    prompt: str = ""
    negative: str = ""
    seed: int = 0
    steps: int = 28
    guidance: float = 7.0
    size: tuple[int, int] | None = None
    """(width, height) in pixels; None before it is known what adapter or model was trained at."""
    loras: tuple[tuple[int, float], ...] = ()
    """Adapters in use: the number of each in the call's list, and its weight. None: the base alone."""
    sampler: str = "euler"
    shift: float | None = None
    """Of the noise levels; None is the base's own."""
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
        return SamplerSettings(self.steps, self.guidance, height, width, self.sampler, self.shift)


def problems_of(shot: Shot, named: Callable[[str], str]) -> list[str]:
    """A line for each value that cannot be; `named` is what a field is called where it was given."""
    problems = []
    if shot.steps < 1:
        problems.append(f"{named('steps')} {shot.steps}: at least 1")
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


def texts_of(shots: Sequence[Shot]) -> list[str]:
    """Every text that is read, once."""
    return list(dict.fromkeys(text for shot in shots for text in (shot.prompt, shot.negative)))
