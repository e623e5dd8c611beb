"""Batches as a function of (step, micro-step): which samples, which crop, which sigma, which noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sd3tune.data.buckets import Size, size_name
from sd3tune.data.sampler import batch_samples, derive, generator, step_slots, uniform
from sd3tune.data.store import Store
from sd3tune.flow.objective import offset_noise
from sd3tune.model.latents import sample_latents


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


@dataclass(frozen=True)
class Dropout:
    """Chances, per sample, of training without its caption; what is drawn depends on (seed, step, slot) alone."""

    caption: float = 0.0
    """Of the empty caption in place of the sample's."""
    encoder: float = 0.0
    """Of zeros in place of a text encoder's output, for each encoder by itself."""
    empty: Mapping[str, str] = field(default_factory=dict)
    """Encoder -> key of the empty caption; needed where `caption` is above 0."""


@dataclass(frozen=True)
class LatentScaling:
    """The VAE's normalisation: z0 = (z - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True)
class Batch:
    """What one micro-step needs, on the device. Everything but the embeddings is fp32."""

    latents: Tensor
    """z0 [B, C, H/8, W/8]: drawn from the stored posterior, normalised."""
    noise: Tensor
    """Standard normal, like `latents`."""
    sigma: Tensor
    """[B], not yet shaped by a density: the shifted, distributed sigma itself."""
    embeddings: Mapping[str, Mapping[str, Tensor]]
    """Per encoder, batched; in the encoders' dtype."""
    names: Sequence[str]
    weights: Tensor
    """[B]: factors on the samples' losses."""


@dataclass(frozen=True)
class _Loaded:
    mean: Tensor
    std: Tensor
    sigma: Tensor
    embeddings: dict[str, dict[str, Tensor]]
    slots: list[int]
    names: list[str]
    weights: Tensor


class Batches:
    """Reads batches from the store, one ahead in a thread. Holds no state that a resumed run would need.

    `sigma_of_u(u, pixels)` maps float64 uniforms to sigma for images of that size; `examples` lists each image as often
    as an epoch sees it. A batch, of all ranks together, holds images of one size.
    """

    def __init__(
        self,
        store: Store,
        examples: Sequence[Example],
        *,
        seed: int,
        batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        device: torch.device,
        scaling: LatentScaling,
        sigma_of_u: Callable[[Tensor, int], Tensor],
        noise_offset: float = 0.0,
        dropout: Dropout = Dropout(),
    ) -> None:
        self.store, self.seed, self.dropout = store, seed, dropout
        self.buckets: dict[str, list[Example]] = {}
        for example in sorted(examples, key=lambda example: example.size):
            self.buckets.setdefault(size_name(example.size), []).append(example)
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.device, self.scaling, self.sigma_of_u, self.noise_offset = device, scaling, sigma_of_u, noise_offset
        self._ahead: tuple[tuple[int, int], Future[_Loaded]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def fetch(self, step: int, micro: int) -> Batch:
        """The batch of micro-step `micro` of optimizer step `step` (both 0-based) of this rank."""
        at = (step, micro)
        loaded = self._ahead[1].result() if self._ahead and self._ahead[0] == at else self._load(*at)
        following = (step, micro + 1) if micro + 1 < self.accumulation else (step + 1, 0)
        self._ahead = (following, self._reader.submit(self._load, *following))
        return self._to_device(step, loaded)

    def seed_for(self, purpose: str, step: int, micro: int) -> int:
        """A seed for what else is random in this micro-step on this rank."""
        return derive(self.seed, step, micro, self.rank, purpose)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _load(self, step: int, micro: int) -> _Loaded:
        slots = list(step_slots(micro, self.rank, self.world, self.batch_size))
        examples = self._examples(step * self.accumulation + micro)
        moments = [
            self.store.get(example.images[derive(self.seed, step, slot, "variant") % len(example.images)])
            for example, slot in zip(examples, slots, strict=True)
        ]
        pixels = 64 * moments[0]["mean"].shape[-2:].numel()
        uniforms = [(derive(self.seed, step, slot, "sigma") >> 11) + 0.5 for slot in slots]
        loaded = _Loaded(
            mean=torch.stack([entry["mean"] for entry in moments]),
            std=torch.stack([entry["std"] for entry in moments]),
            sigma=self.sigma_of_u(torch.tensor(uniforms, dtype=torch.float64) / 2**52, pixels).float(),
            embeddings={
                encoder: _stack([self._embedding(encoder, *pair, step) for pair in zip(examples, slots, strict=True)])
                for encoder in examples[0].captions
            },
            slots=slots,
            names=[example.name for example in examples],
            weights=torch.tensor([example.weight for example in examples], dtype=torch.float32),
        )
        return _pinned(loaded) if self.device.type == "cuda" else loaded

    def _examples(self, number: int) -> list[Example]:
        """This rank's part of the run's micro-batch `number`."""
        counts = [(name, len(examples)) for name, examples in self.buckets.items()]
        bucket, indices = batch_samples(self.seed, number, counts, self.world * self.batch_size)
        mine = indices[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]
        return [self.buckets[bucket][index] for index in mine]

    def _embedding(self, encoder: str, example: Example, slot: int, step: int) -> dict[str, Tensor]:
        chance = self.dropout
        without_caption = chance.caption > uniform(self.seed, step, slot, "caption dropout")
        entry = self.store.get(chance.empty[encoder] if without_caption else example.captions[encoder])
        if chance.encoder > uniform(self.seed, step, slot, "encoder dropout", encoder):
            return {name: torch.zeros_like(tensor) for name, tensor in entry.items()}
        return entry

    def _to_device(self, step: int, loaded: _Loaded) -> Batch:
        mean, std, sigma = (t.to(self.device, non_blocking=True) for t in (loaded.mean, loaded.std, loaded.sigma))
        draws = torch.stack([self._draw(step, slot, mean.shape[1:]) for slot in loaded.slots])
        eps, noise = draws[:, 0], draws[:, 1]
        if self.noise_offset:
            offsets = torch.stack([self._draw_offset(step, slot, mean.shape[1]) for slot in loaded.slots])
            noise = offset_noise(noise, offsets, self.noise_offset)
        return Batch(
            latents=sample_latents(mean, std, eps, self.scaling.scaling_factor, self.scaling.shift_factor),
            noise=noise,
            sigma=sigma,
            embeddings={
                encoder: {key: value.to(self.device, non_blocking=True) for key, value in entry.items()}
                for encoder, entry in loaded.embeddings.items()
            },
            names=loaded.names,
            weights=loaded.weights.to(self.device, non_blocking=True),
        )

    def _draw(self, step: int, slot: int, shape: torch.Size) -> Tensor:
        """Two standard normals of `shape`: the posterior's and the flow's, from this sample's own generator."""
        source = generator(self.seed, step, slot, "noise", device=self.device)
        return torch.randn((2, *shape), generator=source, device=self.device)

    def _draw_offset(self, step: int, slot: int, channels: int) -> Tensor:
        source = generator(self.seed, step, slot, "noise_offset", device=self.device)
        return torch.randn(channels, generator=source, device=self.device)


def _stack(entries: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([entry[key] for entry in entries]) for key in entries[0]}


def _pinned(loaded: _Loaded) -> _Loaded:
    embeddings = {e: {k: v.pin_memory() for k, v in entry.items()} for e, entry in loaded.embeddings.items()}
    return _Loaded(
        loaded.mean.pin_memory(),
        loaded.std.pin_memory(),
        loaded.sigma.pin_memory(),
        embeddings,
        loaded.slots,
        loaded.names,
        loaded.weights.pin_memory(),
    )
