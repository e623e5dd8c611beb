"""Batches with adaLN modulations, computed for a window of many micro-steps at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.flow.objective import model_timestep
from sd3tune.methods import Method
from sd3tune.model.compute.hoist import Modulation, compute_ahead, hoisted, row_bytes
from sd3tune.training.batches import Batch, BatchSource

TABLE_BYTES = 128 * 2**20
"""Limit on the memory of a window's modulations."""
LONGEST = 64
"""Limit on the micro-steps of a window."""


class ForeseeableBatches(BatchSource, Protocol):
    """Batches whose conditions can be read before they are fetched."""

    @property
    def batch_size(self) -> int:
        """The number of instances of a micro-step."""

    @property
    def accumulation(self) -> int:
        """The number of micro-steps of an optimizer step."""

    def conditions(self, step: int, micro: int) -> tuple[Tensor, Mapping[str, Mapping[str, Tensor]]]:
        """Return `sigma` [B] and the pooled embeddings of any batch, on the device, without its latents."""


class AheadBatches:
    """The batches of another source, each with the outputs of the transformer's hoisted layers: its modulations.

    Windows begin at multiples of their length and have one shape, so a resumed run gets bit-equal modulations. One
    batch at a time they would differ by rounding (about 1e-7 in fp32), as the matrix product has another shape.
    """

    def __init__(self, batches: ForeseeableBatches, transformer: SD3Transformer2DModel, method: Method) -> None:
        self.batches, self.transformer, self.method = batches, transformer, method
        rows = batches.batch_size * (2 if batches.with_prior else 1)
        self.length = _length(transformer, rows)
        self.with_prior, self.seed_for, self.names = batches.with_prior, batches.seed_for, batches.names
        self.concepts = batches.concepts
        self._window: tuple[int, Sequence[Modulation]] | None = None

    def fetch(self, step: int, micro: int) -> Batch:
        """Return this rank's batch of micro-step `micro` of optimizer step `step` (both 0-based)."""
        number, place = divmod(step * self.batches.accumulation + micro, self.length)
        if self._window is None or self._window[0] != number:
            self._window = None  # frees the old window before the new one is computed
            self._window = (number, self._compute(number))
        return replace(self.batches.fetch(step, micro), modulation=self._window[1][place])

    def _compute(self, number: int) -> list[Modulation]:
        """Return the modulations of window `number`, one entry per micro-step."""
        first = number * self.length
        steps = [divmod(index, self.batches.accumulation) for index in range(first, first + self.length)]
        conditions = [self.batches.conditions(step, micro) for step, micro in steps]
        sigmas = [sigma for sigma, _ in conditions]
        pooled = torch.cat([self.method.pooled(embeddings, self.transformer) for _, embeddings in conditions])
        (modulation,) = compute_ahead(self.transformer, [(model_timestep(torch.cat(sigmas)), pooled)])
        counts = [len(sigma) for sigma in sigmas]
        return list(zip(*(tensor.split(counts) for tensor in modulation), strict=True))


def _length(transformer: SD3Transformer2DModel, rows: int) -> int:
    """Return the number of batches of `rows` samples in a window."""
    return max(1, min(LONGEST, TABLE_BYTES // (rows * row_bytes(transformer))))


def modulated(batches: Iterable[Batch], transformer: SD3Transformer2DModel, method: Method) -> Iterator[Batch]:
    """Yield batches of one sample each with their modulations, if the transformer's modulation layers are hoisted.

    They are bit-equal to the transformer's own, but its layers are copied to the device once for a window of batches.
    """
    if not hoisted(transformer):
        yield from batches
        return
    rest, length = iter(batches), _length(transformer, rows=1)
    while window := list(itertools.islice(rest, length)):
        pooled = [method.pooled(batch.embeddings, transformer) for batch in window]
        timesteps = [model_timestep(batch.sigma) for batch in window]
        modulations = compute_ahead(transformer, list(zip(timesteps, pooled, strict=True)))
        for batch, modulation in zip(window, modulations, strict=True):
            yield replace(batch, modulation=modulation)


def window_length(batches: BatchSource) -> int:
    """Return the number of micro-steps whose modulations are computed at once; 1 if they are not computed ahead."""
    return batches.length if isinstance(batches, AheadBatches) else 1


def with_modulations(batches: ForeseeableBatches, transformer: SD3Transformer2DModel, method: Method) -> BatchSource:
    """Return `batches`, with modulations computed ahead if the transformer's modulation layers are hoisted."""
    return AheadBatches(batches, transformer, method) if hoisted(transformer) else batches
