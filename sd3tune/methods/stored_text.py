"""Conditioning from the store, for methods with frozen text encoders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config.schema import Config
from sd3tune.config.sections.model import ModelConfig
from sd3tune.methods.base import Embeddings, Saving, Weights
from sd3tune.model.load.text import assemble, pool, tokenize


class StoredText:
    """Base class of methods that train only the transformer."""

    resident: tuple[str, ...] = ("transformer",)
    trained_encoders: tuple[str, ...] = ()
    segments: tuple[str, ...] = ()

    def __init__(self, model: ModelConfig) -> None:
        self.t5_length = model.max_sequence_length
        self.cached_encoders: tuple[str, ...] = ("clip_l", "clip_g", "t5") if model.t5 else ("clip_l", "clip_g")

    def conditioning(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
        t5 = embeddings["t5"]["hidden"] if "t5" in embeddings else None
        prompt_embeds, pooled = assemble(
            embeddings["clip_l"],
            embeddings["clip_g"],
            t5,
            self.t5_length if t5 is None else t5.shape[1],
            transformer.config.joint_attention_dim,
        )
        dtype = next(transformer.parameters()).dtype  # `transformer.dtype` walks the whole model to find out
        return prompt_embeds.to(dtype), pooled.to(dtype)

    def problems_of(self, captions: Collection[str]) -> Sequence[str]:
        return ()

    def stored_text(self, text: str) -> str:
        return text

    def written(self, text: str) -> str:
        return text

    def tokens(self, tokenizer: Any, text: str) -> Tensor:
        return tokenize(tokenizer, self.written(text), tokenizer.model_max_length)

    def companions(self) -> Sequence[nn.Module]:
        return ()

    def extra_loss(self, transformer: SD3Transformer2DModel, batch: Any) -> Tensor | None:
        return None

    def prepare(
        self,
        transformer: SD3Transformer2DModel,
        shapes: Mapping[str, Sequence[int]],
        gradient_norms: Callable[[Sequence[str]], Mapping[str, float]],
    ) -> None:
        """Do nothing: no choice depends on data."""

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        return {}

    def frozen(self, done: float) -> Sequence[str]:
        return ()

    @abstractmethod
    def disabled(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        """See `methods.base.Method`."""

    def untrained(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        return self.disabled(transformer)

    def unrounded(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None] | None:
        return None

    def savings(self, config: Config) -> Sequence[Saving]:
        return ()

    def pooled(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> Tensor:
        dtype = next(transformer.parameters()).dtype
        return pool(embeddings["clip_l"], embeddings["clip_g"]).to(dtype)
