"""Batches with their adaLN modulations, which are computed for a window of many micro-steps at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from sd3tune.flow.objective import model_timestep
from sd3tune.methods import Method
from sd3tune.model.compute.hoist import Modulation, compute_ahead, hoisted, row_bytes
from sd3tune.training.batches import Batch, Batches

TABLE_BYTES = 128 * 2**20
LONGEST = 64
"""Micro-steps of a window, at most."""


class AheadBatches:
    """The batches of `Batches`, each with the modulations that the hoisted layers of `transformer` compute for it.

    Windows begin at multiples of their length and have one shape, so a resumed run gets bit-equal modulations. Computed
    one batch at a time they differ by the rounding of a product of another shape (about 1e-7 in fp32).
    """

    def __init__(self, batches: Batches, transformer: SD3Transformer2DModel, method: Method) -> None:
        self.batches, self.transformer, self.method = batches, transformer, method
        rows = batches.batch_size * (2 if batches.with_prior else 1)
        self.length = max(1, min(LONGEST, TABLE_BYTES // (rows * row_bytes(transformer))))
        self.with_prior, self.seed_for, self.names = batches.with_prior, batches.seed_for, batches.names
        self._window: tuple[int, Sequence[Modulation]] | None = None

    def fetch(self, step: int, micro: int) -> Batch:
        """The batch of micro-step `micro` of optimizer step `step` (both 0-based) of this rank."""
        number, place = divmod(step * self.batches.accumulation + micro, self.length)
        if self._window is None or self._window[0] != number:
            self._window = None  # before the next one is made: the old one is as large
            self._window = (number, self._compute(number))
        return replace(self.batches.fetch(step, micro), modulation=self._window[1][place])

    def _compute(self, number: int) -> list[Modulation]:
        """A window's modulations, micro-step by micro-step."""
        first = number * self.length
        steps = [divmod(index, self.batches.accumulation) for index in range(first, first + self.length)]
        conditions = [self.batches.conditions(step, micro) for step, micro in steps]
        sigmas = [sigma for sigma, _ in conditions]
        pooled = torch.cat([self.method.pooled(embeddings, self.transformer) for _, embeddings in conditions])
        (together,) = compute_ahead(self.transformer, [(model_timestep(torch.cat(sigmas)), pooled)])
        counts = [len(sigma) for sigma in sigmas]
        return list(zip(*(of.split(counts) for of in together), strict=True))


def window_length(batches: Batches) -> int:
    """Micro-steps whose modulations are computed at once; 1 where they are not computed ahead."""
    return batches.length if isinstance(batches, AheadBatches) else 1


def looking_ahead(batches: Batches, transformer: SD3Transformer2DModel, method: Method) -> Batches:
    """`batches`, with modulations where the transformer's layers for them are hoisted."""
    if not hoisted(transformer):
        return batches
    ahead: Any = AheadBatches(batches, transformer, method)  # it has what a step and the loop ask of batches
    return ahead
