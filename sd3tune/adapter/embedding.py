"""The file of learned tokens: `clip_l` [n, 768] and `clip_g` [n, 1280], which ComfyUI reads as `embedding:name`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.adapter.file import ADAPTER_FILE, Adapter, contract_metadata, save_tensors
from sd3tune.adapter.metadata import CONTRACT_KEY, is_safetensors, read_contract, read_tensors
from sd3tune.adapter.names import EMBEDDING_FILE
from sd3tune.errors import AdapterError
from sd3tune.files.tensor_header import BadHeader, read_header
from sd3tune.model.base.contract import WAY_OUT
from sd3tune.model.load.learned_tokens import add_tokens, learn, names_of
from sd3tune.model.load.text import TextEncoder

NAMES = ("clip_l", "clip_g")
__all__ = [
    "EMBEDDING_FILE",
    "NAMES",
    "Embedding",
    "as_read",
    "attach_embeddings",
    "embedding_beside",
    "find_embedding",
    "in_other_words",
    "is_embedding",
    "left_behind",
    "names_of",
    "read_embedding",
    "with_aliases",
    "write_embedding",
]


@dataclass(frozen=True, eq=False)
class Embedding:
    """A learned token: its vectors for each CLIP encoder, fp32, and how to use them."""

    path: Path
    rows: Mapping[str, Tensor]
    """`clip_l` and `clip_g` -> [n, width]."""
    token: str
    """The word of prompts that it stands for: the contract's, or the file's name."""
    t5_caption: str
    """The words that T5 reads in place of the token."""
    contract: Mapping[str, Any]
    """The conditioning contract; empty if another tool wrote the file."""
    origin: str | None = None
    """Repository and commit of an embedding from the Hub, as `user/name:commit`."""
    alias: str = ""
    """Name in the tokenizers, if another embedding in use has the same token."""

    @property
    def vectors(self) -> int:
        return len(self.rows["clip_l"])

    def in_words(self) -> str:
        """Return `4 vectors for <rex>`."""
        return f"{self.vectors} vector{'s' * (self.vectors != 1)} for {self.token}"

    @property
    def names(self) -> list[str]:
        """The names of the vectors in the tokenizers."""
        return names_of(self.alias or self.token, self.vectors)


def write_embedding(folder: Path, rows: Mapping[str, Tensor], contract: Mapping[str, Any]) -> Path:
    """Write the file into `folder`, fp32. Raises AdapterError, before anything is written, for values not finite."""
    tensors = {name: rows[name].detach().float().cpu().contiguous() for name in NAMES}
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise AdapterError(f"{folder}: not written: {bad[0]} is NaN or infinite")
    save_tensors(folder / EMBEDDING_FILE, tensors, {CONTRACT_KEY: contract_metadata(contract)})
    return folder / EMBEDDING_FILE


def find_embedding(location: Path) -> Path:
    """Return the file at a file, a folder, a checkpoint or a run. Raises AdapterError."""
    path = location.expanduser()
    for candidate in (path, *(path / folder / EMBEDDING_FILE for folder in ("", "embedding", "adapter"))):
        if candidate.is_file():
            return candidate
    raise AdapterError(f"{location}: no such file, and no {EMBEDDING_FILE} in it or in its embedding/ folder")


def is_embedding(location: Path) -> bool:
    """Return whether a location holds the embedding of a token, and no adapter."""
    path = location.expanduser()
    if path.is_dir():
        return not any((path / folder / ADAPTER_FILE).is_file() for folder in ("", "adapter")) and any(
            (path / folder / EMBEDDING_FILE).is_file() for folder in ("", "embedding")
        )
    try:
        return is_safetensors(path.name) and set(read_header(path).tensors) == set(NAMES)
    except (BadHeader, OSError):
        return False


def embedding_beside(adapter: Adapter) -> Embedding | None:
    """Return the learned token of pivotal tuning, whose file lies beside the adapter's; None without one.

    Raises AdapterError for a file that cannot be used.
    """
    file = adapter.path.with_name(EMBEDDING_FILE)
    return read_embedding(file) if "embedding" in adapter.contract and file.is_file() else None


def left_behind(adapters: Sequence[Adapter]) -> list[str]:
    """Return a note for each adapter whose learned token a derived file does not have."""
    found = {adapter.path: embedding_beside(adapter) for adapter in adapters}
    return [
        f"note: {one.path} holds the vectors for {one.token} and stays a file of its own: `infer --embedding` and "
        "ComfyUI (models/embeddings/NAME.safetensors, embedding:NAME in the prompt) read it as it is"
        for one in found.values()
        if one is not None
    ]


def read_embedding(location: Path) -> Embedding:
    """Return the learned token of a file. Raises AdapterError for any other file."""
    path = find_embedding(location)
    rows, metadata = read_tensors(path, "embeddings")
    if set(rows) != set(NAMES):
        raise AdapterError(f"{path}: no embedding for SD3: its tensors must be clip_l and clip_g, and they are "
                           f"{', '.join(sorted(rows)[:4]) or 'none'}")  # fmt: skip
    if (
        any(value.ndim != 2 or not value.is_floating_point() for value in rows.values())
        or len({len(value) for value in rows.values()}) != 1
        or not len(rows["clip_l"])
    ):
        raise AdapterError(f"{path}: clip_l and clip_g must be as many vectors each, [n, width]")
    rows = {name: value.float() for name, value in rows.items()}
    if not all(value.isfinite().all() for value in rows.values()):
        raise AdapterError(f"{path}: holds values that are NaN or infinite")
    contract = read_contract(path, metadata)
    stated = contract.get("embedding", contract)
    stated = stated if isinstance(stated, Mapping) else {"token": None}
    token, words = stated.get("token", path.stem), stated.get("t5_caption", path.stem)
    if not (isinstance(token, str) and token.strip() and isinstance(words, str)):
        raise AdapterError(f"{path}: its metadata states no token, or no words for T5{WAY_OUT}")
    return Embedding(path, rows, token, words, contract)


def with_aliases(embeddings: Mapping[int, Embedding]) -> dict[int, Embedding]:
    """Return the embeddings, with an alias for each whose token an earlier one has."""
    seen: set[str] = set()
    found = {}
    for number, one in embeddings.items():
        found[number] = replace(one, alias=f"{one.token}~{number}") if one.token in seen else one
        seen.add(one.token)
    return found


def as_read(encoder: str, text: str, embeddings: Sequence[Embedding]) -> str:
    """Return the text that an encoder reads: the token's vectors written out for CLIP, other words for T5."""
    if encoder == "t5":
        return in_other_words(text, embeddings)
    return _replaced(text, {one.token: " ".join(one.names) for one in embeddings})


def in_other_words(text: str, embeddings: Sequence[Embedding]) -> str:
    """Return the text with T5's words in place of the tokens."""
    return _replaced(text, {one.token: one.t5_caption for one in embeddings})


def _replaced(text: str, words: Mapping[str, str]) -> str:
    tokens = sorted(words, key=len, reverse=True)  # a token may begin with another
    return re.sub("|".join(map(re.escape, tokens)), lambda found: words[found[0]], text) if tokens else text


def attach_embeddings(encoder: TextEncoder, embeddings: Sequence[Embedding]) -> None:
    """Let a CLIP encoder and its tokenizer know the tokens. Raises AdapterError for a word that CLIP knows already."""
    for one in embeddings:
        try:
            add_tokens(encoder.tokenizer, one.names)
        except ValueError:
            raise AdapterError(
                f"{one.path}: {one.token!r} is a word that {encoder.name} knows; rename the file, which names the token"
            ) from None
    rows = torch.cat([one.rows[encoder.name] for one in embeddings])
    encoder.learned = learn(encoder.model, rows.to(next(encoder.model.parameters()).device))
