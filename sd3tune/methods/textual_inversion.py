"""Textual inversion (Gal et al. 2022): embedding vectors of a new token for CLIP-L and CLIP-G; all else is frozen."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.adapter.embedding import EMBEDDING_FILE, NAMES
from sd3tune.config.meaning import contract_of, identity_of
from sd3tune.config.schema import Config
from sd3tune.config.sections.method import TextualInversionConfig
from sd3tune.methods.base import Embeddings, Product, Weights
from sd3tune.methods.learned_token import LearnedToken
from sd3tune.methods.stored_text import StoredText
from sd3tune.model.base.base import Base
from sd3tune.model.compute.fast import plain_path
from sd3tune.model.lora.targets import CoverageRow


class TextualInversionMethod(StoredText):
    """See `methods.base.Method`."""

    product = Product("embedding", EMBEDDING_FILE)
    exported_bytes = 4
    block_measure = "relative change of the vectors"
    remedy = "method.init"
    trained_encoders: tuple[str, ...] = NAMES
    resident: tuple[str, ...] = ("transformer", *NAMES)

    def __init__(self, config: Config, base: Base) -> None:
        super().__init__(config.model)
        self.settings = cast(TextualInversionConfig, config.method)
        self.text = LearnedToken(self.settings, base, "method")

    def select(self, transformer: nn.Module) -> list[str]:
        return self.text.select(None)

    def coverage(self, transformer: nn.Module) -> list[CoverageRow]:
        return self.text.coverage()

    def title(self) -> str:
        return f"textual inversion, {self.text.in_words()}"

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        transformer.requires_grad_(False)
        return self.text.inject(generator, None, next(transformer.parameters()).dtype, transformer.device)

    def companions(self) -> Sequence[nn.Module]:
        return self.text.companions()

    def initialize_from_data(
        self, transformer: SD3Transformer2DModel, observe: Callable[[], object], reduce_mean: Callable[[Tensor], Tensor]
    ) -> None:
        """Do nothing: the first vectors do not depend on data."""

    def problems_of(self, captions: Collection[str]) -> Sequence[str]:
        return self.text.problems_of(captions)

    def stored_text(self, text: str) -> str:
        return self.text.stored(text)

    def written(self, text: str) -> str:
        return self.text.written(text)

    def tokens(self, tokenizer: Any, text: str) -> Tensor:
        self.text.add_to(tokenizer)
        return super().tokens(tokenizer, text)

    def conditioning(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
        return super().conditioning(self.text.encoded(embeddings), transformer)

    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> AbstractContextManager[None]:
        return nullcontext()

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        return self.text.exported(weights)

    def as_exported(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None]:
        return self._computing_with(transformer, self.exported(weights))

    @contextmanager
    def _computing_with(self, transformer: SD3Transformer2DModel, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        with self.text.as_exported(tensors), plain_path(transformer):
            yield

    @contextmanager
    def disabled(self, transformer: SD3Transformer2DModel) -> Iterator[None]:
        with self.text.disabled(), plain_path(transformer):
            yield

    def untrained(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        return self._computing_with(transformer, self.text.first)  # the class words would count as a change

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        return self.text.changes(self.exported(weights))

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        return self.text.write(folder, self.exported(weights), contract)

    def sampling_shift(self) -> float | None:
        return None

    def infer_arguments(self, run: Path) -> list[str]:
        return ["--embedding", str(run)]

    def contract(self) -> dict[str, Any]:
        stated = contract_of(self.settings)
        return {"method": self.settings.kind, **stated, "t5_caption": self.settings.class_words}

    def identity(self) -> dict[str, Any]:
        return identity_of(self.settings, {})
