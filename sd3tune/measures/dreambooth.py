"""The DreamBooth protocol: its prompts by kind of subject, and the paper's figures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from sd3tune.config.yaml12 import parse

Kind = Literal["object", "live"]


@dataclass(frozen=True)
class Reference:
    """A row of the paper: means over its 30 subjects; None where it has no figure."""

    of: str
    dino: float
    clip_i: float
    clip_t: float | None


@dataclass(frozen=True)
class DreamBooth:
    """The protocol. Prompts have `{}` in place of the subject."""

    seeds: int
    """Pictures of each prompt."""
    object: tuple[str, ...]
    live: tuple[str, ...]
    object_classes: tuple[str, ...]
    live_classes: tuple[str, ...]
    reference: tuple[Reference, ...]

    def templates(self, kind: Kind) -> tuple[str, ...]:
        """Return the 25 prompts of a kind of subject, with `{}`."""
        return self.live if kind == "live" else self.object

    def prompts(self, kind: Kind, subject: str) -> list[str]:
        """Return the 25 prompts about `subject`: name and class, or the class alone."""
        return [template.replace("{}", subject) for template in self.templates(kind)]

    def kind_of(self, class_word: str) -> Kind:
        """Return "live" if the class, or its last word ("corgi dog"), is a live class, else "object"."""
        name = " ".join(class_word.lower().split())
        if name in self.object_classes:
            return "object"
        return "live" if name.rpartition(" ")[2] in self.live_classes else "object"


@cache
def dreambooth() -> DreamBooth:
    """Read the protocol from the package."""
    text = files("sd3tune.measures").joinpath("dreambooth.yaml").read_text(encoding="utf-8")
    content: Any = parse(text).value
    every, kinds = content["every"], content["kinds"]
    return DreamBooth(
        seeds=content["seeds"],
        object=(*every, *kinds["object"]),
        live=(*every, *kinds["live"]),
        object_classes=tuple(content["classes"]["object"]),
        live_classes=tuple(content["classes"]["live"]),
        reference=tuple(Reference(**row) for row in content["reference"]),
    )
