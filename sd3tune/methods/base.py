"""The Method protocol, the training loop's only interface to a training method."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config.schema import Config
from sd3tune.model.lora.targets import CoverageRow

Embeddings = Mapping[str, Mapping[str, Tensor]]
"""Per encoder (`clip_l`, `clip_g`, `t5`): `hidden` [B, tokens, width]; the CLIP encoders also `pooled` [B, width]."""

Weights = Mapping[str, Tensor]
"""Trained tensors by name, fp32."""


@dataclass(frozen=True)
class Product:
    """The result of a method: its name, which is also its folder in a run, and the file that is written last."""

    name: str
    file: str

    @property
    def raw(self) -> str:
        """Folder of the raw weights, if folder `name` has the EMA weights."""
        return f"{self.name}_raw"

    def is_in(self, folder: Path) -> bool:
        return (folder / self.name / self.file).exists()


@dataclass(frozen=True)
class Saving:
    """A setting of one method that saves memory."""

    section: str
    key: str
    value: Any
    words: str = ""
    """The saving in words, for the advice on running out of memory; empty if it is not advised there."""
    planned: bool = True
    """True if `sd3tune plan` lists it."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Other keys of the section that must be set with it."""

    @property
    def values(self) -> dict[str, Any]:
        return {self.key: self.value, **self.needs}

    @property
    def typed(self) -> str:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in self.values.items()}
        return " ".join(f"{self.section}.{key}={text}" for key, text in texts.items())


class Method(Protocol):
    """A training method: resident components, trainable parameters, conditioning and export.

    Its section in `config.sections.method` declares if it freezes the base and if its product is an adapter.
    """

    resident: tuple[str, ...]
    """Components that stay in memory while training."""
    cached_encoders: tuple[str, ...]
    """Text encoders whose output, with the base's weights, comes from the store."""
    trained_encoders: tuple[str, ...]
    """Text encoders that are trained. Their entries in `Embeddings` also hold `tokens` [B, 77], int64 on the CPU; zeros
    stand for a dropped caption."""
    segments: tuple[str, ...]
    """Prefixes of parameter names whose gradients are clipped by themselves. The parameters of each follow each other,
    after all others."""
    product: Product
    exported_bytes: int
    """Bytes per trained parameter in the exported files."""
    block_measure: str
    """Name of the measure in `block_changes`, for reports."""
    remedy: str
    """Config key to check, besides learning rate and steps, if training changed nothing."""

    def select(self, transformer: nn.Module) -> list[str]:
        """Return the names of the modules to train; works on the meta device. Raises UserError."""

    def coverage(self, transformer: nn.Module) -> list[CoverageRow]:
        """Return the selected modules and their parameter counts, as rows of a table."""

    def title(self) -> str:
        """Return the method in a few words, such as `lora, rank 16`."""

    def prepare(
        self,
        transformer: SD3Transformer2DModel,
        shapes: Mapping[str, Sequence[int]],
        gradient_norms: Callable[[Sequence[str]], Mapping[str, float]],
    ) -> None:
        """Choose, before `inject`, what depends on data: as in a resumed run, whose trained tensors have these shapes.

        Without shapes, `gradient_norms(modules)` measures the norm of the gradient by each module's weight.
        """

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        """Add the trainable parameters to the model and return them, fp32; all else is frozen.

        `generator(name)` returns a seeded generator.
        """

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        """Return the learning rates of trained parameters as multiples of `optimizer.lr`; those at 1 may be missing."""

    def frozen(self, done: float) -> Sequence[str]:
        """Return the prefixes of names whose parameters are trained no more, once a share `done` of the steps is."""

    def companions(self) -> Sequence[nn.Module]:
        """Return the other models that `inject` loads; they stay in memory while training."""

    def initialize_from_data(
        self, transformer: SD3Transformer2DModel, observe: Callable[[], object], reduce_mean: Callable[[Tensor], Tensor]
    ) -> None:
        """Initialize trainable weights from data, before the first step; `observe()` runs a few batches."""

    def conditioning(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
        """Return `prompt_embeds` [B, tokens, width] and `pooled_prompt_embeds` [B, width], in the model's dtype."""

    def pooled(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> Tensor:
        """Return the `pooled_prompt_embeds` of `conditioning`; the embeddings need no `hidden`.

        It is not called if `trained_encoders` names any.
        """

    def problems_of(self, captions: Collection[str]) -> Sequence[str]:
        """Return a line for each reason why these captions cannot be trained on."""

    def stored_text(self, text: str) -> str:
        """Return the text that the store encodes, and that the untrained base reads, for a caption or prompt."""

    def written(self, text: str) -> str:
        """Return the text that a trained encoder reads for a caption or prompt."""

    def tokens(self, tokenizer: Any, text: str) -> Tensor:
        """Return the tokens of a text for a trained encoder, [77] int64, given its own tokenizer."""

    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> AbstractContextManager[None]:
        """Enable training-only regularisation, such as dropout, drawn from `seed`, in forward and backward pass."""

    def extra_loss(self, transformer: SD3Transformer2DModel, batch: Any) -> Tensor | None:
        """Return a scalar to add to the loss of a `training.batches.Batch`, or None."""

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        """Return the tensors that `export` writes for these weights."""

    def as_exported(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None]:
        """Run the model with the exported weights, while the context lasts; the live weights are restored after it.

        Results equal diffusers' to the bit, as the fast path is off. This also holds for `disabled`.
        """

    def unrounded(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None] | None:
        """Run the model as `as_exported` does, without the rounding of the file; None if it is not to be reported."""

    def disabled(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        """Run the model as the untrained base, while the context lasts."""

    def untrained(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        """Run the model as before the first step: the reference of a report, usually `disabled`."""

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        """Return the change of each block by these weights, in the measure `block_measure`."""

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        """Write the result with its conditioning contract into `folder`. Return the path of the product's file."""

    def sampling_shift(self) -> float | None:
        """Return the sampling shift of the result; None for the base scheduler's own."""

    def infer_arguments(self, run: Path) -> list[str]:
        """Return the arguments of `sd3tune infer` that load a finished run."""

    def contract(self) -> dict[str, Any]:
        """Return the method's part of the conditioning contract."""

    def identity(self) -> dict[str, Any]:
        """Return the method's part of the run identity, which must not change on resume."""

    def savings(self, config: Config) -> Sequence[Saving]:
        """Return the method's own settings that save memory, the cheapest first."""
