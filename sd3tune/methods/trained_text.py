"""The trained part of the text encoders, beside or instead of a method's parameters in the transformer.

A trained encoder stays in memory and encodes its captions in every step. Each distinct caption of a micro-batch is
encoded once, by itself, so that without training its embedding equals the store's to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from sd3tune.adapter.file import Adapter
from sd3tune.methods.base import Embeddings, Weights
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.load.text import TOKENS, TextEncoder
from sd3tune.model.lora.targets import CoverageRow


class TrainedText(ABC):
    """The trained encoders of a method. Names of parameters begin with the encoder's folder in diffusers' layout,
    `text_encoder.` or `text_encoder_2.`.
    """

    def __init__(self, names: Sequence[str], base: Base | None) -> None:
        self.names, self._known_base = tuple(names), base
        self.live: dict[str, TextEncoder] = {}
        """The encoders in memory, by name; empty before `inject`."""
        self._reads_store = False
        self._exported = False

    @property
    def base(self) -> Base:
        assert self._known_base is not None
        return self._known_base

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of parameter names, for each encoder."""
        return tuple(f"{part_of(name)}." for name in self.names)

    def of_transformer(self, tensors: Weights) -> dict[str, Tensor]:
        """Return the tensors that belong to no encoder."""
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(self.prefixes)}

    def companions(self) -> Sequence[nn.Module]:
        """Return the encoders' models."""
        return [encoder.model for encoder in self.live.values()]

    def encoded(self, embeddings: Embeddings) -> Embeddings:
        """Return the embeddings with the trained encoders' own, from the tokens of their captions."""
        if self._reads_store:
            return embeddings
        with torch.no_grad() if self._exported else nullcontext():
            return {
                **embeddings,
                **{name: encode_entries(encoder, embeddings[name]) for name, encoder in self.live.items()},
            }

    @contextmanager
    def without_gradients(self) -> Iterator[None]:
        """Encode without gradients, inside the context."""
        before, self._exported = self._exported, True
        try:
            yield
        finally:
            self._exported = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Use the store's embeddings, which are the base's, inside the context."""
        before, self._reads_store = self._reads_store, True
        try:
            yield
        finally:
            self._reads_store = before

    @abstractmethod
    def select(self, start: Adapter | None) -> list[str]:
        """Return the names of the trained modules. Raises AdapterError if `start` cannot be continued."""

    @abstractmethod
    def coverage(self) -> list[CoverageRow]:
        """Return a row for each trained encoder."""

    @abstractmethod
    def title(self) -> str:
        """Return the trained parts in a few words, each after a semicolon; empty without any."""

    @abstractmethod
    def inject(
        self,
        generator: Callable[[str], torch.Generator],
        start: Adapter | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, nn.Parameter]:
        """Load the encoders, add their parameters, and return these, fp32."""

    @abstractmethod
    def rates(self, names: Iterable[str], peak: float) -> dict[str, float]:
        """Return the learning rates of the encoders' parameters among `names`, as multiples of `peak`."""

    @abstractmethod
    def exported(self, weights: Weights) -> dict[str, Tensor]:
        """Return the trained encoders' part of `weights` as it is written, by name of the parameter."""

    @abstractmethod
    def as_exported(self, tensors: Weights) -> AbstractContextManager[None]:
        """Encode with the `exported` tensors, without gradients, inside the context."""

    @abstractmethod
    def changes(self, tensors: Weights) -> dict[str, float]:
        """Return the change of each encoder by `exported` tensors."""


def part_of(name: str) -> str:
    """Return the folder of an encoder, such as `text_encoder_2` for `clip_g`."""
    return ENCODER_PARTS[name][1]


def encode_entries(encoder: TextEncoder, entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entry [B, ...] computed by the encoder. A row of zeros as tokens is a dropped caption: it is zeros."""
    tokens, names = entry[TOKENS], [name for name in entry if name != TOKENS]
    texts = [tuple(row) for row in tokens.tolist()]
    rows: dict[tuple[int, ...], Mapping[str, Tensor]] = {}
    for number, text in enumerate(texts):
        if text not in rows:
            here = slice(number, number + 1)
            if any(text):
                rows[text] = encoder.compute(tokens[here])
            else:
                rows[text] = {name: torch.zeros_like(entry[name][here]) for name in names}
    return {name: torch.cat([rows[text][name] for text in texts]) for name in names}
