"""Textual inversion (Gal et al. 2022): embedding vectors of a new token for CLIP-L and CLIP-G; all else is frozen.

The vectors in use always have the mean norm of the vocabulary's: a parameter gives their direction. The store holds the
captions with the class words in place of the token, for T5 and for the untrained base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.adapter.embedding import EMBEDDING_FILE, NAMES, write_embedding
from sd3tune.config.meaning import contract_of, identity_of
from sd3tune.config.schema import Config
from sd3tune.config.sections.method import TextualInversionConfig
from sd3tune.errors import ConfigError, ModelError
from sd3tune.methods.base import Embeddings, Product, Weights
from sd3tune.methods.stored_text import StoredText
from sd3tune.methods.text_encoders import encode_entries
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS, LABELS
from sd3tune.model.compute.fast import plain_path
from sd3tune.model.load.components import load_text_encoder, text_encoder_shape
from sd3tune.model.load.learned_tokens import (
    LearnedEmbedding,
    add_tokens,
    learn,
    names_of,
    scaled,
    usual_norm,
    written_out,
)
from sd3tune.model.load.text import TextEncoder
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
        self.settings, self.base = cast(TextualInversionConfig, config.method), base
        self.live: dict[str, TextEncoder] = {}
        self._start: dict[str, Tensor] = {}
        """The first vectors, by parameter name."""
        self._norm: dict[str, Tensor] = {}
        self._reads_store = self._exported = False

    def select(self, transformer: nn.Module) -> list[str]:
        return [_parameter(name) for name in NAMES]

    def coverage(self, transformer: nn.Module) -> list[CoverageRow]:
        count = self.settings.vectors
        return [
            CoverageRow(f"{LABELS[name]} vectors", count, count, count * self._width(name), in_blocks=False)
            for name in NAMES
        ]

    def title(self) -> str:
        count = self.settings.vectors
        return f"textual inversion, {count} vector{'s' * (count != 1)} for {self.settings.token}"

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        transformer.requires_grad_(False)
        dtype, device = next(transformer.parameters()).dtype, transformer.device
        parameters: dict[str, nn.Parameter] = {}
        for name in NAMES:
            encoder = self.live[name] = load_text_encoder(self.base, name, dtype, device)
            table = cast(Any, encoder.model).text_model.embeddings.token_embedding
            key = _parameter(name)
            self._norm[key] = usual_norm(table)
            self._start[key] = self._scaled(key, self._first_rows(encoder, table))
            parameters[key] = nn.Parameter(self._start[key].clone())
            encoder.learned = learn(encoder.model, parameters[key], self._norm[key])
        return parameters

    def _first_rows(self, encoder: TextEncoder, table: nn.Embedding) -> Tensor:
        """Return [n, width] fp32: the embeddings of the words of `init`, in turn."""
        count = self.settings.vectors
        if encoder.tokenizer is None:  # a rehearsal
            return table.weight[:count].float()
        if len(encoder.tokenizer) != table.num_embeddings:
            raise ModelError(
                f"{self.base.name}: {encoder.name} has {table.num_embeddings} embeddings and its tokenizer "
                f"{len(encoder.tokenizer)} tokens; learned tokens need as many"
            )
        words = encoder.tokenizer(self.settings.init, add_special_tokens=False).input_ids
        return table.weight[torch.tensor([words[number % len(words)] for number in range(count)])].float()

    def _scaled(self, key: str, rows: Tensor) -> Tensor:
        return scaled(rows, self._norm[key])

    def companions(self) -> Sequence[nn.Module]:
        return [encoder.model for encoder in self.live.values()]

    def initialize_from_data(
        self, transformer: SD3Transformer2DModel, observe: Callable[[], object], reduce_mean: Callable[[Tensor], Tensor]
    ) -> None:
        """Do nothing: the first vectors do not depend on data."""

    def problems_of(self, captions: Collection[str]) -> Sequence[str]:
        token = self.settings.token
        if any(token in caption for caption in captions):
            return ()
        return [f"method.token: {token} is in no caption, so it would learn nothing; write it in the captions"]

    def stored_text(self, text: str) -> str:
        return text.replace(self.settings.token, self.settings.class_words)

    def tokens(self, tokenizer: Any, text: str) -> Tensor:
        names = names_of(self.settings.token, self.settings.vectors)
        if names[-1] not in tokenizer.get_added_vocab():
            try:
                add_tokens(tokenizer, names)
            except ValueError:
                raise ConfigError(
                    f"method.token: {names[0]} is a word that CLIP knows; take a new one, such as <{names[0]}>"
                ) from None
        return super().tokens(tokenizer, written_out(text, self.settings.token, self.settings.vectors))

    def conditioning(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
        if self._reads_store or not self.live:
            return super().conditioning(embeddings, transformer)
        with torch.no_grad() if self._exported else nullcontext():
            encoded = {name: encode_entries(encoder, embeddings[name]) for name, encoder in self.live.items()}
            return super().conditioning({**embeddings, **encoded}, transformer)

    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> AbstractContextManager[None]:
        return nullcontext()

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        return {name: self._scaled(_parameter(name), weights[_parameter(name)]) for name in NAMES}

    @contextmanager
    def as_exported(self, transformer: SD3Transformer2DModel, weights: Weights) -> Iterator[None]:
        rows, before = self.exported(weights), self._exported
        try:
            self._exported = True
            with ExitStack() as stack:
                for name, encoder in self.live.items():
                    stack.enter_context(cast(LearnedEmbedding, encoder.learned).using(rows[name]))
                stack.enter_context(plain_path(transformer))
                yield
        finally:
            self._exported = before

    @contextmanager
    def disabled(self, transformer: SD3Transformer2DModel) -> Iterator[None]:
        before, self._reads_store = self._reads_store, True
        try:
            with plain_path(transformer):
                yield
        finally:
            self._reads_store = before

    def untrained(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        return self.as_exported(transformer, self._start)  # the class words of the base would count as a change

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        starts = {name: self._start[_parameter(name)] for name in NAMES}
        rows = self.exported(weights)
        return {LABELS[name]: ((rows[name] - start).norm() / start.norm()).item() for name, start in starts.items()}

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        return write_embedding(folder, self.exported(weights), contract)

    def sampling_shift(self) -> float | None:
        return None

    def infer_arguments(self, run: Path) -> list[str]:
        return ["--embedding", str(run)]

    def contract(self) -> dict[str, Any]:
        stated = contract_of(self.settings)
        return {"method": self.settings.kind, **stated, "t5_caption": self.settings.class_words}

    def identity(self) -> dict[str, Any]:
        return identity_of(self.settings, {})

    def _width(self, name: str) -> int:
        width: int = text_encoder_shape(self.base, name, torch.float32).config.hidden_size  # type: ignore[union-attr, assignment]
        return width


def _parameter(name: str) -> str:
    return f"{ENCODER_PARTS[name][1]}.tokens"
