"""The measured cells: bases, sizes, batches, precisions and checkpointing; the most informative come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

T5_TOKENS = 256
RANK = 16
SIDES = ("example", "sd3tune")


@dataclass(frozen=True, eq=False)
class Shapes:
    """The sizes of a measurement."""

    bases: Mapping[str, str]
    """Display name -> value of `model.base`; only its configurations are read."""
    large: int
    """Side in pixels; see `Cell.pixels`."""
    small: int
    matrix: int
    """Side of the square matrices of the measured product."""
    copied_bytes: int
    attention: tuple[int, int, int]
    """Heads, tokens, width of a head."""
    steps: int
    """Limit on the steps of a timed turn."""


SHAPES = {
    "full": Shapes(
        {
            "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
            "sd3-medium": "stabilityai/stable-diffusion-3-medium-diffusers",
            "sd35-large": "stabilityai/stable-diffusion-3.5-large",
        },
        large=1024,
        small=512,
        matrix=8192,
        copied_bytes=1 << 30,
        attention=(24, 4096 + 77 + T5_TOKENS, 64),
        steps=10,
    ),
    "tiny": Shapes(
        {"sd35-medium": "tiny", "sd3-medium": "tiny-sd3", "sd35-large": "tiny-sd35-large"},
        large=64,
        small=32,
        matrix=64,
        copied_bytes=1 << 16,
        attention=(2, 20, 16),
        steps=1,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    base: str
    pixels: int
    """Side of the square images."""
    batch: int
    precision: str = "bf16"
    """`bf16`, or `nf4` for a base in 4 bits; both compute in bf16."""
    checkpointing: str = "none"
    """`train.gradient_checkpointing`; the example checkpoints whole blocks for `selective`, too."""

    @property
    def name(self) -> str:
        parts = [self.base, f"{self.pixels} px", f"batch {self.batch}", self.precision]
        return ", ".join(parts if self.checkpointing == "none" else [*parts, f"{self.checkpointing} checkpointing"])


def cells_of(shapes: Shapes) -> list[Cell]:
    """Return all cells, the most informative first, as a time budget cuts off the end."""
    large, small = shapes.large, shapes.small
    kinds: Sequence[tuple[int, int, str, str]] = (
        (large, 1, "bf16", "none"),
        (small, 1, "bf16", "none"),
        (large, 4, "bf16", "selective"),
        (large, 4, "bf16", "block"),
        (large, 1, "nf4", "block"),
        (small, 4, "bf16", "none"),
        (large, 4, "bf16", "none"),
        (large, 1, "bf16", "selective"),
        (large, 1, "bf16", "block"),
        (large, 1, "nf4", "none"),
        (large, 1, "nf4", "selective"),
        (small, 1, "nf4", "none"),
        (small, 4, "nf4", "none"),
        (large, 4, "nf4", "selective"),
        (large, 4, "nf4", "block"),
        *((small, batch, form, way) for way in ("block", "selective") for form in ("bf16", "nf4") for batch in (1, 4)),
        (large, 4, "nf4", "none"),
    )
    return [Cell(base, *kind) for kind in kinds for base in shapes.bases]
