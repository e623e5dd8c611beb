"""Adapters by name: a local file or folder, or a repository on the Hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from sd3tune.adapter.embedding import EMBEDDING_FILE, Embedding, read_embedding
from sd3tune.adapter.file import ADAPTER_FILE, Adapter, read_adapter
from sd3tune.adapter.metadata import is_safetensors
from sd3tune.adapter.peft_config import CONFIG_FILE, WEIGHTS_FILE
from sd3tune.config.yaml12 import YamlError, parse
from sd3tune.errors import AdapterError, ModelError
from sd3tune.model.base.hub import download, files_in_root

CARD = "README.md"
_ON_THE_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w./-]+))?", re.ASCII)
_WEIGHTS = (ADAPTER_FILE, f"adapter/{ADAPTER_FILE}", WEIGHTS_FILE)
_LEARNED = tuple(f"{folder}{EMBEDDING_FILE}" for folder in ("", "embedding/", "adapter/"))
_MOST_OF_CARD = 2**20
"""Number of bytes read from a card, whose YAML header comes first."""


def load_adapter(location: Path, *, transformer_only: bool = False) -> Adapter:
    """Read `location`: a local path, else the Hub repository `user/name` or `user/name:revision`.

    A cached repository needs no network. See `read_adapter` for `transformer_only`. Raises UserError.
    """
    named = _ON_THE_HUB.fullmatch(str(location))
    if named is None or is_safetensors(location.name) or location.exists():
        return read_adapter(location, transformer_only=transformer_only)
    folder, file = _fetched(named[1], named[2], _WEIGHTS, [*_LEARNED, CONFIG_FILE, CARD], "--lora")
    adapter = read_adapter(file, transformer_only=transformer_only)
    return replace(adapter, origin=f"{named[1]}:{folder.name}", base_in_card=_base_in_card(folder / CARD))


def load_embedding(location: Path) -> Embedding:
    """Read the learned token at `location`, which is as for `load_adapter`. Raises AdapterError."""
    named = _ON_THE_HUB.fullmatch(str(location))
    if named is None or is_safetensors(location.name) or location.exists():
        return read_embedding(location)
    folder, file = _fetched(named[1], named[2], _LEARNED, [], "--embedding")
    return replace(read_embedding(file), origin=f"{named[1]}:{folder.name}")


def _fetched(
    repo: str, revision: str | None, files: Sequence[str], more: Sequence[str], flag: str
) -> tuple[Path, Path]:
    """Return a repository's folder and, in it, the first of `files` that is there, else the only safetensors file.

    Files that match `more` are downloaded with it. Raises AdapterError, a line that begins with `flag`.
    """
    otherwise = f"give {flag} a folder"
    try:
        folder = download(repo, revision, [*files, *more], otherwise=otherwise)
        file = next((folder / name for name in files if (folder / name).is_file()), None)
        return folder, file or _only_file(repo, folder, files[0], flag)
    except ModelError as error:
        weight = flag == "--lora" and re.fullmatch(r"[\d.]+", revision or "")
        hint = f"; a weight is written {repo}@{revision}" if weight else ""
        raise AdapterError(*(f"{flag} {problem}{hint}" for problem in error.problems)) from None


def _only_file(repo: str, folder: Path, wanted: str, flag: str) -> Path:
    """Return the only safetensors file of a repository, of any name, as other tools upload it."""
    otherwise = f"give {flag} a folder"
    try:
        names = files_in_root(repo, folder.name, otherwise)
    except ModelError:
        names = [path.name for path in folder.iterdir()]  # the cached files may be enough
        if not any(map(is_safetensors, names)):
            raise
    files = list(filter(is_safetensors, names))
    if len(files) != 1:
        held = f"none of {', '.join(files)} is named so" if files else "it holds no .safetensors file"
        raise AdapterError(f"{flag} {repo}: no {wanted} in this repository, and {held}; download the one you want")
    return download(repo, folder.name, [glob.escape(files[0])], otherwise=otherwise) / files[0]


def _base_in_card(card: Path) -> str | None:
    """Return `base_model` in the YAML header of a card, the first of several; None without one."""
    if not card.is_file():
        return None
    with card.open("rb") as file:
        text = file.read(_MOST_OF_CARD).decode(errors="replace")
    header = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        values = parse(header[1]).value if header else None
    except YamlError:
        return None
    base = values.get("base_model") if isinstance(values, dict) else None
    base = base[0] if isinstance(base, list) and base else base
    return base if isinstance(base, str) else None
