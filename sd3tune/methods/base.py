"""The Method protocol: all that the training loop knows of what is being trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config.schema import Config
from sd3tune.model.lora.targets import CoverageRow

Embeddings = Mapping[str, Mapping[str, Tensor]]
"""Per encoder (`clip_l`, `clip_g`, `t5`): `hidden` [B, tokens, width], and `pooled` [B, width] for the CLIPs."""

Weights = Mapping[str, Tensor]
"""Trained tensors by name, fp32."""


@dataclass(frozen=True)
class Product:
    """What a method makes: the word for it, which names its folder in a run, and the file that it is complete with."""

    name: str
    file: str

    @property
    def raw(self) -> str:
        """The folder of the weights as trained, where those of `name` are the average."""
        return f"{self.name}_raw"

    def is_in(self, folder: Path) -> bool:
        return (folder / self.name / self.file).exists()


@dataclass(frozen=True)
class Saving:
    """A change of a setting that takes less memory, which only makes sense with this method."""

    section: str
    key: str
    value: Any
    words: str = ""
    """What it saves, in words, to advise it when the memory is used up; empty where it is not advised then."""
    planned: bool = True
    """Whether `sd3tune plan` shows it."""

    @property
    def typed(self) -> str:
        return f"{self.section}.{self.key}={self.value}"


class Method(Protocol):
    """A way to train: what is resident, what is trained, how a batch becomes conditioning, what is written.

    Whether it freezes the base and whether its product is an adapter stand in its section, `config.sections.method`.
    """

    resident: tuple[str, ...]
    """Components that stay in memory while training."""
    cached_encoders: tuple[str, ...]
    """Text encoders that are frozen, so that their output may come from the store."""
    product: Product
    exported_bytes: int
    """Bytes of a trained parameter in the exported files."""
    block_measure: str
    """What `block_changes` measures, in words."""
    remedy: str
    """What else to look at, besides rate and length, when training changed nothing."""

    def select(self, transformer: nn.Module) -> list[str]:
        """Names of the modules to train; works on a meta-device model. Raises UserError if that cannot be done."""

    def coverage(self, transformer: nn.Module) -> list[CoverageRow]:
        """What `select` comes to, as a table for people."""

    def title(self) -> str:
        """What is trained, in a few words."""

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        """Make the trainable parameters, fp32, part of the model; all else is frozen. `generator(name)` is seeded."""

    def initialize_from_data(
        self, transformer: SD3Transformer2DModel, observe: Callable[[], object], reduce_mean: Callable[[Tensor], Tensor]
    ) -> None:
        """Initialize trainable weights from data, before the first step; `observe()` runs a few batches."""

    def conditioning(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
        """`prompt_embeds` [B, tokens, width] and `pooled_prompt_embeds` [B, width], in the transformer's dtype."""

    def pooled(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> Tensor:
        """The second part of `conditioning`, of embeddings that need no `hidden`."""

    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> AbstractContextManager[None]:
        """While the context lasts (forward and backward), what acts in training only, drawn from `seed`, is on."""

    def extra_loss(self, transformer: SD3Transformer2DModel, batch: Any) -> Tensor | None:
        """A scalar that a micro-step adds to the loss of its `training.batches.Batch`; None adds nothing."""

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        """The tensors of the file that `export` writes for these trained weights."""

    def as_exported(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None]:
        """While the context lasts, the model computes what the exported file computes; the live weights rest.

        As diffusers has it, to the bit: off the fast path. So is `disabled`.
        """

    def disabled(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        """While the context lasts, the model is the untrained base."""

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        """How much these weights change of each block, as `block_measure` says."""

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        """Write the result that users share, with the whole conditioning contract; returns `product`'s file."""

    def sampling_shift(self) -> float | None:
        """The shift that the result is sampled with; None where that is the base scheduler's own."""

    def infer_arguments(self, run: Path) -> list[str]:
        """What `sd3tune infer` is to be told of a finished run."""

    def contract(self) -> dict[str, Any]:
        """What the method itself states in the conditioning contract."""

    def identity(self) -> dict[str, Any]:
        """What must be the same of it for a resumed run to be the run it resumes."""

    def savings(self, config: Config) -> Sequence[Saving]:
        """Its own ways to take less memory, the cheapest first."""
