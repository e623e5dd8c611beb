"""What a batch is made of: training images in the store, and what stands beside them to keep their class as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sd3tune.data.buckets import Size, size_name
from sd3tune.data.sampler import index_at
from sd3tune.data.seeds import derive


@dataclass(frozen=True)
class Example:
    """One training image in the store: a key per crop variant, and a key per text encoder."""

    name: str
    images: tuple[str, ...]
    captions: Mapping[str, str]
    size: Size
    """(height, width) in pixels; images of one size form a bucket."""
    weight: float = 1.0
    """Factor on its loss."""
    prior: Prior | None = None


@dataclass(frozen=True)
class Sample:
    """A row of a batch: an example, and the slot from which everything random about it follows."""

    example: Example
    slot: int | str
    is_kept: bool = False
    """True: the target is the base's own prediction instead of the true velocity."""


class Prior(Protocol):
    """Prior preservation: the samples that are trained beside a source's images."""

    def companion_sample(self, instance: Sample, seed: int, position: int) -> Sample:
        """The sample that goes with `instance`, which is at `position` of its bucket's endless stream."""

    def facts(self) -> dict[str, Any]:
        """Return the settings that change the training, for JSON."""


@dataclass(frozen=True)
class ClassImages:
    """Pictures of the class, each with its own caption, noise and sigma (DreamBooth, Ruiz et al. 2022, eq. 2)."""

    source: int
    pools: Mapping[Size, Sequence[Example]]
    """By bucket; never empty for a bucket in which the source has images."""

    def companion_sample(self, instance: Sample, seed: int, position: int) -> Sample:
        size = instance.example.size
        pool = self.pools[size]
        stream = derive(seed, "class images", self.source, size_name(size))
        return Sample(pool[index_at(stream, position, len(pool))], f"class {instance.slot}")

    def facts(self) -> dict[str, Any]:
        pools = [[[of.images, dict(of.captions), of.weight] for of in pool] for pool in self.pools.values()]
        return {"kind": "images", "pools": pools}


@dataclass(frozen=True)
class OwnPrediction:
    """A sample of the same noisy latents under a class caption; its target is the base's own prediction."""

    captions: Sequence[Mapping[str, str]]
    """Encoder -> key, of each class caption; at least one, and each used equally often."""
    weight: float

    def companion_sample(self, instance: Sample, seed: int, position: int) -> Sample:
        stream = derive(seed, "class captions", size_name(instance.example.size))
        captions = self.captions[index_at(stream, position, len(self.captions))]
        kept = replace(instance.example, captions=captions, weight=self.weight, prior=None)
        return Sample(kept, instance.slot, is_kept=True)

    def facts(self) -> dict[str, Any]:
        captions = [dict(of) for of in self.captions]
        return {"kind": "prediction", "captions": captions, "weight": self.weight}
