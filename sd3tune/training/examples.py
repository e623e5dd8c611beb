"""The samples of a batch: training images in the store, and prior samples that preserve their class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sd3tune.data.buckets import Size, size_name
from sd3tune.data.sampler import index_at
from sd3tune.data.seeds import derive


@dataclass(frozen=True)
class MaskedVariants:
    """The mask of a training image, for each of its crop variants, and the loss outside it."""

    keys: tuple[str, ...]
    """Store key of each crop variant's mask."""
    outside_weight: float
    """Weight of the loss outside the mask, relative to inside."""
    keeps_base: bool = False
    """True if the base's own prediction is the target outside the mask."""


@dataclass(frozen=True)
class Example:
    """A training image in the store."""

    name: str
    images: tuple[str, ...]
    """Store key of each crop variant."""
    captions: Mapping[str, str]
    """Text encoder -> store key of the encoded caption; of several captions, the first."""
    size: Size
    """(height, width) in pixels; images of one size form a bucket."""
    weight: float = 1.0
    """Factor on its loss."""
    prior: Prior | None = None
    concept: int = 0
    """Index of its concept; see `data.concepts`."""
    choices: tuple[Mapping[str, str], ...] = ()
    """`captions` of each caption, of which each step draws one; empty if there is only one."""
    mask: MaskedVariants | None = None


def content_of(example: Example) -> dict[str, str] | list[dict[str, str]]:
    """Return the captions of an example as JSON: encoder -> store key; a list of these for several captions."""
    return [dict(captions) for captions in example.choices] or dict(example.captions)


@dataclass(frozen=True)
class Sample:
    """A row of a batch: an example, and the slot that seeds its noise, sigma and dropout."""

    example: Example
    slot: int | str
    is_kept: bool = False
    """True if the target is the base model's prediction instead of the true velocity."""

    def variant(self, seed: int, step: int) -> int:
        """Return the number of the step's crop variant: each of the example's is equally likely."""
        return derive(seed, step, self.slot, "variant") % len(self.example.images)

    def captions(self, seed: int, step: int) -> Mapping[str, str]:
        """Return encoder -> store key of the step's caption: each of the example's is equally likely."""
        choices = self.example.choices
        return choices[derive(seed, step, self.slot, "caption") % len(choices)] if choices else self.example.captions


class Prior(Protocol):
    """Prior preservation: adds a sample of the class to each of a source's images."""

    def companion_sample(self, instance: Sample, seed: int, position: int) -> Sample:
        """Return the prior sample for `instance`, which is at `position` of its bucket's endless stream."""

    def facts(self) -> dict[str, Any]:
        """Return the settings that affect training, as JSON values."""


@dataclass(frozen=True)
class ClassImages:
    """Images of the class, each with its own caption, noise and sigma (DreamBooth, Ruiz et al. 2022, eq. 2)."""

    source: int
    """Index of the source."""
    pools: Mapping[Size, Sequence[Example]]
    """Bucket -> class images; not empty for any bucket that holds images of the source."""

    def companion_sample(self, instance: Sample, seed: int, position: int) -> Sample:
        size = instance.example.size
        pool = self.pools[size]
        stream = derive(seed, "class images", self.source, size_name(size))
        return Sample(pool[index_at(stream, position, len(pool))], f"class {instance.slot}")

    def facts(self) -> dict[str, Any]:
        pools = [
            [[example.images, content_of(example), example.weight] for example in pool] for pool in self.pools.values()
        ]
        return {"kind": "images", "pools": pools}


@dataclass(frozen=True)
class OwnPrediction:
    """The instance's noisy latents under a class caption; the target is the base model's prediction."""

    captions: Sequence[Mapping[str, str]]
    """Encoder -> store key, for each class caption. At least one; each is used equally often."""
    weight: float
    drift_limit: float | None = None
    """Limit that steers the weight; see `training.drift`."""

    def companion_sample(self, instance: Sample, seed: int, position: int) -> Sample:
        stream = derive(seed, "class captions", size_name(instance.example.size))
        captions = self.captions[index_at(stream, position, len(self.captions))]
        kept = replace(instance.example, captions=captions, choices=(), weight=self.weight, prior=None, mask=None)
        return Sample(kept, instance.slot, is_kept=True)

    def facts(self) -> dict[str, Any]:
        captions = [dict(keys) for keys in self.captions]
        limit = {} if self.drift_limit is None else {"drift_limit": self.drift_limit}
        return {"kind": "prediction", "captions": captions, "weight": self.weight, **limit}
