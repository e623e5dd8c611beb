"""The keys of a source for masks, which weigh the loss inside and outside the subject."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal, Protocol, TypeAlias

from pydantic import Field

from sd3tune.config.sections.key import CONTENT, Identity, Key


def _is_mask_folder(text: str, folder: Path) -> bool:
    """Return True for a path, and False for the two words that are none."""
    return text not in ("alpha", "off")


_ALPHA_OR_OFF = (
    "alpha: the alpha channel of each image is its mask; transparent parts are still laid on white. off: no masks."
)

MasksOfDataset: TypeAlias = Annotated[
    Literal["alpha", "off"] | None,
    CONTENT,
    Field(description=f"null uses the masks that are found. {_ALPHA_OR_OFF}"),
]
Masks: TypeAlias = Annotated[
    str | None,
    Key(Identity.CONTENT, path=_is_mask_folder),
    Field(
        min_length=1,
        examples=["./masks"],
        description="Folder of masks: `cats/tom.png` or `cats/tom_mask.png` there is the mask of `cats/tom.jpg` in the "
        "source. null uses the `mask` column of the metadata, else `tom_mask.png` or `tom-masklabel.png` next to "
        f"`tom.jpg`, which are never read as photos. {_ALPHA_OR_OFF}",
    ),
]
MaskColumn: TypeAlias = Annotated[
    str | None,
    CONTENT,
    Field(min_length=1, description="Column with the masks, as images or paths; null: `mask`, if there is one."),
]
OutsideWeight: TypeAlias = Annotated[
    float,
    CONTENT,
    Field(
        ge=0,
        le=1,
        description="Weight of the loss outside the mask; inside it is 1. The weights of an image are divided by their "
        "mean, so that a small subject counts as much as a large one.",
    ),
]
OutsideTarget: TypeAlias = Annotated[
    Literal["image", "base"],
    CONTENT,
    Field(
        description="Target of the loss outside the mask: image, or base, the base's own prediction, which keeps "
        "backgrounds as the base draws them. base computes one more forward pass a step.",
    ),
]


class Masked(Protocol):
    """A source, which may have masks."""

    @property
    def outside_target(self) -> str: ...


def any_keeps_base(sources: Iterable[Masked]) -> bool:
    """Return True if the base's own prediction is the target outside the masks of some source."""
    return any(source.outside_target == "base" for source in sources)
