"""Batches as a function of (seed, step, micro-step): samples, crops, sigmas and noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain
from operator import attrgetter
from typing import Protocol

import torch
from torch import Tensor

from sd3tune.data.buckets import Size, size_name
from sd3tune.data.concepts import balanced
from sd3tune.data.sampler import Buckets, batch_samples, generator, index_at, step_slots, uniform
from sd3tune.data.seeds import derive
from sd3tune.data.store import Store
from sd3tune.flow.objective import offset_noise, perturbed_noise
from sd3tune.model.compute.hoist import Modulation
from sd3tune.model.load.latents import sample_latents
from sd3tune.model.load.text import on_device
from sd3tune.training.examples import Example, Sample
from sd3tune.training.masked import read_positions


@dataclass(frozen=True)
class Dropout:
    """Caption dropout: per-sample probabilities, drawn from (seed, step, slot)."""

    caption: float = 0.0
    """Probability of the empty caption."""
    encoder: float = 0.0
    """Probability of replacing an encoder's output by zeros, drawn for each encoder separately."""
    empty: Mapping[str, str] = field(default_factory=dict)
    """Encoder -> store key of the empty caption; required if `caption` is above 0."""
    kept: bool = False
    """True if dropout also applies to samples that keep the base's prediction. Only runs that an earlier version began
    do so, as the same input then has two targets."""


T5Lengths = Sequence[Mapping[str, str]]
"""One mapping per trained T5 length: store key in an example -> store key of the same caption at that length."""


@dataclass(frozen=True)
class LatentScaling:
    """The VAE's normalisation: z0 = (z - shift_factor) * scaling_factor."""

    scaling_factor: float
    shift_factor: float


@dataclass(frozen=True)
class Batch:
    """The data of one micro-step, on the device but for tokens. All fp32, except embeddings and modulations.

    The instances come first, then the prior samples of those whose source has a prior: B samples in all.
    """

    latents: Tensor
    """z0, [B, C, H/8, W/8]: sampled from the stored posterior, normalised."""
    noise: Tensor
    """Standard normal, in the shape of `latents`, plus the noise offset if there is one."""
    sigma: Tensor
    """[B]: the final sigmas, drawn from the configured density and shifted."""
    embeddings: Mapping[str, Mapping[str, Tensor]]
    """Encoder -> name -> tensor [B, ...], in the encoders' dtype; see `Method.trained_encoders` for their tokens."""
    weights: Tensor
    """[B]: weights of the samples' losses."""
    names: Sequence[str]
    """Image of each sample."""
    instances: int
    """Number of instances."""
    kept: slice
    """Samples whose target is the base's prediction: the last ones, if any."""
    input_noise: Tensor | None = None
    """The noise of the input, in the shape of `latents`, if it is perturbed; `noise` is that of the target."""
    position_weights: Tensor | None = None
    """[B, H/8, W/8]: weights of the loss at latent positions, mean 1 for each sample; None without masks."""
    from_base: Tensor | None = None
    """[B, H/8, W/8] in [0, 1]: the share of the base's prediction in the target; None if it is 0 everywhere."""
    modulation: Modulation | None = None
    """The adaLN modulations for `sigma` and the pooled text; None if the transformer computes them."""

    @property
    def size(self) -> Size:
        """(height, width) of the images in pixels."""
        height, width = self.latents.shape[-2:]
        return 8 * height, 8 * width

    def rows(self, rows: slice) -> Batch:
        """Return a batch of some of the samples, all counted as instances."""
        return Batch(
            latents=self.latents[rows],
            noise=self.noise[rows],
            sigma=self.sigma[rows],
            embeddings={
                e: {name: tensor[rows] for name, tensor in entry.items()} for e, entry in self.embeddings.items()
            },
            weights=self.weights[rows],
            names=self.names[rows],
            instances=len(self.names[rows]),
            kept=slice(0, 0),
            input_noise=None if self.input_noise is None else self.input_noise[rows],
            position_weights=None if self.position_weights is None else self.position_weights[rows],
            from_base=None if self.from_base is None else self.from_base[rows],
            modulation=self.modulation and [tensor[rows] for tensor in self.modulation],
        )


class BatchSource(Protocol):
    """The batches of a rank, as the training uses them. `step` and `micro`, its micro-steps, are 0-based."""

    @property
    def with_prior(self) -> bool:
        """True if some instance has a prior sample."""

    def fetch(self, step: int, micro: int) -> Batch:
        """Return this rank's batch of a micro-step."""

    def seed_for(self, purpose: str, step: int, micro: int) -> int:
        """Return a seed for any other random numbers of this micro-step on this rank."""

    def names(self, step: int) -> Sequence[str]:
        """Return the images of a step on all ranks, in the order of the metrics."""

    def concepts(self, step: int) -> Sequence[str]:
        """Return the concepts of the instances among `names`; empty unless there are several."""


@dataclass(frozen=True)
class _Loaded:
    mean: Tensor
    std: Tensor
    sigma: Tensor
    embeddings: dict[str, dict[str, Tensor]]
    weights: Tensor
    positions: Mapping[str, Tensor]
    """See `read_positions`."""
    samples: list[Sample]
    instances: int


class Batches:
    """The batches of a rank, read from the store by a thread, one ahead: the `BatchSource` of a run.

    They hold no state that a resume would need. `sigma_of(u, pixels)` maps float64 uniforms to sigma for images of that
    size; `examples` lists each image as often as an epoch sees it. With `shares`, an epoch draws as many samples, but
    each concept in its share (see `data.concepts.balanced`). A batch, of all ranks together, holds images of one size.
    `concepts` are the concepts' names, if there are several.
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
        sigma_of: Callable[[Tensor, int], Tensor],
        noise_offset: float = 0.0,
        input_perturbation: float = 0.0,
        dropout: Dropout = Dropout(),
        t5_lengths: T5Lengths = (),
        shares: Sequence[Fraction] | None = None,
        concepts: Sequence[str] = (),
    ) -> None:
        self.store, self.seed, self.dropout, self.t5_lengths = store, seed, dropout, t5_lengths
        self.buckets: dict[str, list[Example]] = {}
        order = attrgetter("size") if shares is None else attrgetter("size", "concept")
        for example in sorted(examples, key=order):
            self.buckets.setdefault(size_name(example.size), []).append(example)
        self._counts = _counts(self.buckets, shares)
        self._concepts = concepts
        self.batch_size, self.accumulation, self.rank, self.world = batch_size, accumulation, rank, world
        self.device, self.scaling, self.sigma_of, self.noise_offset = device, scaling, sigma_of, noise_offset
        self.input_perturbation = input_perturbation
        self.with_prior = any(example.prior for example in examples)
        self._ahead: tuple[tuple[int, int], Future[_Loaded]] | None = None
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")

    def fetch(self, step: int, micro: int) -> Batch:
        """Return this rank's batch of micro-step `micro` of optimizer step `step` (both 0-based)."""
        at = (step, micro)
        loaded = self._ahead[1].result() if self._ahead and self._ahead[0] == at else self._load(*at)
        following = (step, micro + 1) if micro + 1 < self.accumulation else (step + 1, 0)
        self._ahead = (following, self._reader.submit(self._load, *following))
        return self._to_device(step, loaded)

    def conditions(self, step: int, micro: int) -> tuple[Tensor, Mapping[str, Mapping[str, Tensor]]]:
        """Return `sigma` [B] and the pooled embeddings of any batch, on the device, without its latents."""
        samples = self._samples(step, micro, self.rank)
        pooled = {
            encoder: torch.stack([self._embedding(encoder, sample, step)["pooled"] for sample in samples])
            for encoder in samples[0].example.captions
            if encoder != "t5"
        }
        on_device = {encoder: {"pooled": rows.to(self.device)} for encoder, rows in pooled.items()}
        return self._sigma(step, samples).to(self.device), on_device

    def use_one_length(self) -> None:
        """Use `max_sequence_length` for all T5 embeddings from now on, as for previews and held-out loss."""
        self.t5_lengths, self._ahead = (), None

    def seed_for(self, purpose: str, step: int, micro: int) -> int:
        """Return a seed for any other random numbers of this micro-step on this rank."""
        return derive(self.seed, step, micro, self.rank, purpose)

    def close(self) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def names(self, step: int) -> list[str]:
        """Return the images of a step on all ranks, rank by rank in batch order; the prior samples come last."""
        batches = [[sample.example.name for sample in samples] for samples in self._on_all_ranks(step)]
        instances = chain(*(names[: self.batch_size] for names in batches))
        return [*instances, *chain(*(names[self.batch_size :] for names in batches))]

    def concepts(self, step: int) -> list[str]:
        """Return the concept of each instance of a step on all ranks, in the order of `names`; empty for one."""
        every = self._on_all_ranks(step) if self._concepts else []
        instances = chain(*(samples[: self.batch_size] for samples in every))
        return [self._concepts[sample.example.concept] for sample in instances]

    def _on_all_ranks(self, step: int) -> list[list[Sample]]:
        """Return the samples of each batch of a step, rank by rank."""
        places = [(rank, micro) for rank in range(self.world) for micro in range(self.accumulation)]
        return [self._samples(step, micro, rank) for rank, micro in places]

    def _load(self, step: int, micro: int) -> _Loaded:
        samples = self._samples(step, micro, self.rank)
        chosen = [(sample.example, sample.variant(self.seed, step)) for sample in samples]
        moments = [self.store.get(example.images[variant]) for example, variant in chosen]
        loaded = _Loaded(
            mean=torch.stack([entry["mean"] for entry in moments]),
            std=torch.stack([entry["std"] for entry in moments]),
            sigma=self._sigma(step, samples),
            embeddings={
                encoder: _stack([self._embedding(encoder, sample, step) for sample in samples])
                for encoder in samples[0].example.captions
            },
            weights=torch.tensor([sample.example.weight for sample in samples], dtype=torch.float32),
            positions=read_positions(self.store, chosen, moments[0]["mean"].shape[1:]),
            samples=samples,
            instances=self.batch_size,
        )
        return _pinned(loaded) if self.device.type == "cuda" else loaded

    def _samples(self, step: int, micro: int, rank: int) -> list[Sample]:
        """Return the samples of a rank: its part of the run's micro-batch, then their prior samples."""
        batch = self.world * self.batch_size
        bucket, piece, indices = batch_samples(self.seed, step * self.accumulation + micro, self._counts, batch)
        places = range(rank * self.batch_size, (rank + 1) * self.batch_size)
        slots = step_slots(micro, rank, self.world, self.batch_size)
        instances = [
            Sample(self.buckets[bucket][indices[place]], slot) for place, slot in zip(places, slots, strict=True)
        ]
        companions = [
            instance.example.prior.companion_sample(instance, self.seed, piece * batch + place)
            for instance, place in zip(instances, places, strict=True)
            if instance.example.prior
        ]
        return [*instances, *sorted(companions, key=lambda sample: sample.is_kept)]

    def _sigma(self, step: int, samples: Sequence[Sample]) -> Tensor:
        height, width = samples[0].example.size
        uniforms = [(derive(self.seed, step, sample.slot, "sigma") >> 11) + 0.5 for sample in samples]
        return self.sigma_of(torch.tensor(uniforms, dtype=torch.float64) / 2**52, height * width).float()

    def _embedding(self, encoder: str, sample: Sample, step: int) -> dict[str, Tensor]:
        dropout, captions, slot = self.dropout, sample.captions(self.seed, step), sample.slot
        is_exempt = sample.is_kept and not dropout.kept
        if not is_exempt and dropout.caption > uniform(self.seed, step, slot, "caption dropout"):
            captions = dropout.empty
        entry = self.store.get(self._at_length(captions[encoder], step) if encoder == "t5" else captions[encoder])
        if not is_exempt and dropout.encoder > uniform(self.seed, step, slot, "encoder dropout", encoder):
            return {name: torch.zeros_like(tensor) for name, tensor in entry.items()}
        return entry

    def _at_length(self, key: str, step: int) -> str:
        """Return the key of a T5 entry at this step's length, which all samples of all ranks share."""
        if not self.t5_lengths:
            return key
        return self.t5_lengths[index_at(derive(self.seed, "t5 length"), step, len(self.t5_lengths))][key]

    def _to_device(self, step: int, loaded: _Loaded) -> Batch:
        mean, std, sigma = (t.to(self.device, non_blocking=True) for t in (loaded.mean, loaded.std, loaded.sigma))
        positions = {name: t.to(self.device, non_blocking=True) for name, t in loaded.positions.items()}
        slots = [sample.slot for sample in loaded.samples]
        draws = torch.stack([self._draw(step, slot, "noise", (2, *mean.shape[1:])) for slot in slots])
        eps, noise = draws[:, 0], draws[:, 1]
        if self.noise_offset:
            offsets = torch.stack([self._draw(step, slot, "noise_offset", mean.shape[1:2]) for slot in slots])
            noise = offset_noise(noise, offsets, self.noise_offset)
        input_noise = None
        if self.input_perturbation:
            more = torch.stack([self._draw(step, slot, "input_perturbation", mean.shape[1:]) for slot in slots])
            input_noise = perturbed_noise(noise, more, self.input_perturbation)
        return Batch(
            latents=sample_latents(mean, std, eps, self.scaling.scaling_factor, self.scaling.shift_factor),
            noise=noise,
            input_noise=input_noise,
            sigma=sigma,
            embeddings={encoder: on_device(entry, self.device) for encoder, entry in loaded.embeddings.items()},
            weights=loaded.weights.to(self.device, non_blocking=True),
            names=[sample.example.name for sample in loaded.samples],
            instances=loaded.instances,
            kept=slice(sum(not sample.is_kept for sample in loaded.samples), len(loaded.samples)),
            position_weights=positions.get("position_weights"),
            from_base=positions.get("from_base"),
        )

    def _draw(self, step: int, slot: int | str, name: str, shape: Sequence[int]) -> Tensor:
        """Return standard normals from the sample's own generator of that name."""
        return torch.randn(
            shape, generator=generator(self.seed, step, slot, name, device=self.device), device=self.device
        )


def _counts(buckets: Mapping[str, Sequence[Example]], shares: Sequence[Fraction] | None) -> Buckets:
    if shares is None:
        return [(name, len(examples)) for name, examples in buckets.items()]
    concepts = {name: [example.concept for example in examples] for name, examples in buckets.items()}
    return list(balanced(concepts, shares).items())


def _stack(entries: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([entry[key] for entry in entries]) for key in entries[0]}


def _pinned(loaded: _Loaded) -> _Loaded:
    return replace(
        loaded,
        mean=loaded.mean.pin_memory(),
        std=loaded.std.pin_memory(),
        sigma=loaded.sigma.pin_memory(),
        embeddings={e: {k: v.pin_memory() for k, v in entry.items()} for e, entry in loaded.embeddings.items()},
        weights=loaded.weights.pin_memory(),
        positions={name: tensor.pin_memory() for name, tensor in loaded.positions.items()},
    )
