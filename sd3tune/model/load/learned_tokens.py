"""Learned tokens: rows of a text encoder's embedding table beyond its vocabulary (textual inversion, Gal et al. 2022).

A token of n vectors is written out as n tokens, `<rex> <rex>_1 ...`, as in diffusers. CLIP takes its pooled vector at
the token with the highest number, which must stay the end of the text. So the model never sees a learned number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def names_of(token: str, vectors: int) -> list[str]:
    """Return the names of a token's vectors."""
    return [token, *(f"{token}_{number}" for number in range(1, vectors))]


def written_out(text: str, token: str, vectors: int) -> str:
    """Return the text with all vectors of the token in its place."""
    return text.replace(token, " ".join(names_of(token, vectors)))


def add_tokens(tokenizer: Any, names: Sequence[str]) -> None:
    """Add new tokens, which are numbered from the size of the vocabulary on. Raises ValueError for a known one."""
    first = len(tokenizer)
    tokenizer.add_tokens(list(names))
    if tokenizer.convert_tokens_to_ids(list(names)) != list(range(first, first + len(names))):
        raise ValueError(f"{names[0]} is in the vocabulary already")


class LearnedEmbedding(nn.Module):
    """A frozen embedding table, and `rows` [n, width] behind it. `take` must be called before each forward pass.

    With `norm`, a scalar, the rows are used at that norm.
    """

    def __init__(self, table: nn.Embedding, rows: Tensor, norm: Tensor | None = None) -> None:
        super().__init__()
        self.table = table
        self._kept = (rows, norm)  # a parameter in a tuple is not one of the module
        self._tokens: Tensor | None = None

    def take(self, tokens: Tensor) -> Tensor:
        """Remember the tokens, and return them with 0 in the place of learned ones, for the model."""
        self._tokens = tokens
        return tokens.masked_fill(tokens >= self.table.num_embeddings, 0)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [B, T, width] for the tokens that were taken; `ids` are the model's."""
        assert self._tokens is not None
        rows, norm = self._kept
        rows = (rows if norm is None else scaled(rows, norm)).to(self.table.weight.dtype)
        numbers = self._tokens - self.table.num_embeddings
        embedded: Tensor = torch.where((numbers >= 0)[..., None], rows[numbers.clamp(min=0)], self.table(ids))
        return embedded

    @contextmanager
    def using(self, rows: Tensor) -> Iterator[None]:
        """Use other rows, as they are, inside the context."""
        kept, self._kept = self._kept, (rows, None)
        try:
            yield
        finally:
            self._kept = kept


def scaled(rows: Tensor, norm: Tensor) -> Tensor:
    """Return the rows at a norm, fp32."""
    return F.normalize(rows.float(), dim=1) * norm


def learn(model: Any, rows: Tensor, norm: Tensor | None = None) -> LearnedEmbedding:
    """Put `rows` behind the vocabulary of a CLIP text model; their numbers begin at its size."""
    embeddings = model.text_model.embeddings
    learned = LearnedEmbedding(embeddings.token_embedding, rows, norm)
    embeddings.token_embedding = learned
    return learned


def usual_norm(table: nn.Embedding) -> Tensor:
    """Return the mean norm of the vocabulary's rows, a scalar."""
    return table.weight.float().norm(dim=1).mean()
