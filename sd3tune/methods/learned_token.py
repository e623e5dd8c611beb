"""The vectors of a new token for CLIP-L and CLIP-G (textual inversion, Gal et al. 2022).

The vectors in use always have the mean norm of the vocabulary's: a parameter gives their direction. The store holds the
captions with the class words in place of the token, for T5 and for the untrained base.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sd3tune.adapter.embedding import NAMES, Embedding, embedding_beside, write_embedding
from sd3tune.adapter.file import Adapter
from sd3tune.config.sections.learned_token import LearnedTokenKeys
from sd3tune.errors import AdapterError, ConfigError, ModelError
from sd3tune.methods.base import Weights
from sd3tune.methods.start_from import transformer_alone
from sd3tune.methods.trained_text import TrainedText, part_of
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import LABELS
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


class LearnedToken(TrainedText):
    """The vectors that `settings` describes, which the keys of `section` configure: `<part>.tokens` [n, width].

    Their learning rate is `lr`, or with None `optimizer.lr`.
    """

    def __init__(self, settings: LearnedTokenKeys, base: Base, section: str, lr: float | None = None) -> None:
        super().__init__(NAMES, base)
        self.settings, self.section, self.lr = settings, section, lr
        self.first: dict[str, Tensor] = {}
        """The first vectors, by parameter name."""
        self._norm: dict[str, Tensor] = {}

    def in_words(self) -> str:
        """Return `4 vectors for <rex>`."""
        count = self.settings.vectors
        return f"{count} vector{'s' * (count != 1)} for {self.settings.token}"

    def title(self) -> str:
        return f"; {self.in_words()}"

    def rates(self, names: Iterable[str], peak: float) -> dict[str, float]:
        return {} if self.lr is None else {name: self.lr / peak for name in names if name.startswith(self.prefixes)}

    def select(self, start: Adapter | None) -> list[str]:
        if start is not None and start.text_parts:
            raise AdapterError(
                f"method.start_from: {start.path} also adapts text encoders, which this run does not train; "
                f"{transformer_alone(start)}"
            )
        begun = None if start is None else embedding_beside(start)
        if begun is not None and (begun.token, begun.vectors) != (self.settings.token, self.settings.vectors):
            raise AdapterError(
                f"method.start_from: {begun.path} has {begun.vectors} vectors for {begun.token} where this run has "
                f"{self.in_words()}; set {self.section}.token and {self.section}.vectors to the file's"
            )
        return [_parameter(name) for name in NAMES]

    def coverage(self) -> list[CoverageRow]:
        count = self.settings.vectors
        return [
            CoverageRow(f"{LABELS[name]} vectors", count, count, count * self._width(name), in_blocks=False)
            for name in NAMES
        ]

    def inject(
        self,
        generator: Callable[[str], torch.Generator],
        start: Adapter | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, nn.Parameter]:
        parameters: dict[str, nn.Parameter] = {}
        begun = None if start is None else embedding_beside(start)
        for name in NAMES:
            encoder = self.live[name] = load_text_encoder(self.base, name, dtype, device)
            table = cast(Any, encoder.model).text_model.embeddings.token_embedding
            key = _parameter(name)
            self._norm[key] = usual_norm(table)
            self.first[key] = self._scaled(key, self._first_rows(encoder, table, begun))
            parameters[key] = nn.Parameter(self.first[key].clone())
            encoder.learned = learn(encoder.model, parameters[key], self._norm[key])
        return parameters

    def _first_rows(self, encoder: TextEncoder, table: nn.Embedding, begun: Embedding | None) -> Tensor:
        """Return [n, width] fp32: the vectors to go on from, or the embeddings of the words of `init`, in turn."""
        count = self.settings.vectors
        if begun is not None:
            return begun.rows[encoder.name].to(table.weight.device)
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

    def problems_of(self, captions: Collection[str]) -> Sequence[str]:
        """See `methods.base.Method`."""
        token = self.settings.token
        if any(token in caption for caption in captions):
            return ()
        return [f"{self.section}.token: {token} is in no caption, so it would learn nothing; write it in the captions"]

    def stored(self, text: str) -> str:
        """Return the text with the class words in place of the token."""
        return text.replace(self.settings.token, self.settings.class_words)

    def written(self, text: str) -> str:
        """Return the text with all vectors of the token in its place."""
        return written_out(text, self.settings.token, self.settings.vectors)

    def add_to(self, tokenizer: Any) -> None:
        """Add the token to a tokenizer, once. Raises ConfigError if it is a word of the vocabulary."""
        names = names_of(self.settings.token, self.settings.vectors)
        if names[-1] in tokenizer.get_added_vocab():
            return
        try:
            add_tokens(tokenizer, names)
        except ValueError:
            raise ConfigError(
                f"{self.section}.token: {names[0]} is a word that CLIP knows; take a new one, such as <{names[0]}>"
            ) from None

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        return {key: self._scaled(key, weights[key]) for key in map(_parameter, NAMES)}

    def rows(self, tensors: Weights) -> dict[str, Tensor]:
        """Return the `exported` tensors by encoder."""
        return {name: tensors[_parameter(name)] for name in NAMES}

    def write(self, folder: Path, tensors: Weights, contract: Mapping[str, Any]) -> Path:
        """Write the `exported` tensors into `folder`, and return the file. Raises AdapterError."""
        return write_embedding(folder, self.rows(tensors), contract)

    @contextmanager
    def as_exported(self, tensors: Weights) -> Iterator[None]:
        with ExitStack() as stack:
            for name, encoder in self.live.items():
                stack.enter_context(cast(LearnedEmbedding, encoder.learned).using(tensors[_parameter(name)]))
            stack.enter_context(self.without_gradients())
            yield

    def changes(self, tensors: Weights) -> dict[str, float]:
        """Return the relative change of the vectors of each encoder, from `exported` tensors."""
        firsts = self.rows(self.first)
        return {
            LABELS[name]: ((rows - firsts[name]).norm() / firsts[name].norm()).item()
            for name, rows in self.rows(tensors).items()
        }

    def _width(self, name: str) -> int:
        width: int = text_encoder_shape(self.base, name, torch.float32).config.hidden_size  # type: ignore[union-attr, assignment]
        return width


def _parameter(name: str) -> str:
    return f"{part_of(name)}.tokens"
