"""Pivotal tuning: a new token, as in textual inversion, and LoRA; the token is frozen before the end.

The name is Roich et al.'s (2021), who invert an image and then tune the model around the result; here both begin
together, as in diffusers' advanced scripts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.adapter.file import check_finite
from sd3tune.config.schema import Config
from sd3tune.config.sections.method import PivotalConfig
from sd3tune.methods.base import Weights
from sd3tune.methods.learned_token import LearnedToken
from sd3tune.methods.lora import LoraMethod
from sd3tune.methods.trained_text import TrainedText
from sd3tune.model.base.base import Base


class PivotalMethod(LoraMethod):
    """See `methods.base.Method`."""

    block_measure = f"{LoraMethod.block_measure}, and relative change of the vectors"

    def __init__(self, config: Config, base: Base) -> None:
        self.pivot = cast(PivotalConfig, config.method).embedding
        self.token = LearnedToken(self.pivot, base, "method.embedding", self.pivot.lr)
        super().__init__(config, base)

    def trained_text(self, base: Base | None) -> TrainedText:
        return self.token

    def frozen(self, done: float) -> Sequence[str]:
        return self.token.prefixes if done >= self.pivot.until else ()

    def problems_of(self, captions: Collection[str]) -> Sequence[str]:
        return self.token.problems_of(captions)

    def stored_text(self, text: str) -> str:
        return self.token.stored(text)

    def written(self, text: str) -> str:
        return self.token.written(text)

    def tokens(self, tokenizer: Any, text: str) -> Tensor:
        self.token.add_to(tokenizer)
        return super().tokens(tokenizer, text)

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        return {**super().exported(weights), **self.token.exported(weights)}  # the vectors are fp32 in any file

    @contextmanager
    def untrained(self, transformer: SD3Transformer2DModel) -> Iterator[None]:
        with self.token.as_exported(self.token.first), self.without_adapter(transformer):
            yield

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        tensors = self.exported(weights)
        check_finite(folder, tensors, self.export_dtype)  # of both files, before the first is written
        self.token.write(folder, tensors, contract)
        return self.write(folder, self.token.of_transformer(tensors), contract)

    def contract(self) -> dict[str, Any]:
        stated = self.pivot.model_dump()
        return {**super().contract(), "embedding": {**stated, "t5_caption": self.pivot.class_words}}
