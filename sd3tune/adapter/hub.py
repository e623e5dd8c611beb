"""Adapters by name: a local file or folder, or a repository on the Hub."""

from __future__ import annotations

import glob
import re
from dataclasses import replace
from pathlib import Path

from sd3tune.adapter.embedding import EMBEDDING_FILE
from sd3tune.adapter.file import ADAPTER_FILE, Adapter, read_adapter
from sd3tune.adapter.metadata import is_safetensors
from sd3tune.adapter.peft_config import CONFIG_FILE, WEIGHTS_FILE
from sd3tune.config.yaml12 import YamlError, parse
from sd3tune.errors import AdapterError, ModelError
from sd3tune.model.base.hub import download, files_in_root

CARD = "README.md"
_ON_THE_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?::([\w./-]+))?", re.ASCII)
_WEIGHTS = (ADAPTER_FILE, f"adapter/{ADAPTER_FILE}", WEIGHTS_FILE)
_WANTED = [*_WEIGHTS, EMBEDDING_FILE, f"adapter/{EMBEDDING_FILE}", CONFIG_FILE, CARD]
_OTHERWISE = "give --lora a folder"
_MOST_OF_CARD = 2**20
"""Number of bytes read from a card, whose YAML header comes first."""


def load_adapter(location: Path, *, transformer_only: bool = False) -> Adapter:
    """Read `location`: a local path, else the Hub repository `user/name` or `user/name:revision`.

    A cached repository needs no network. See `read_adapter` for `transformer_only`. Raises UserError.
    """
    named = _ON_THE_HUB.fullmatch(str(location))
    if named is None or is_safetensors(location.name) or location.exists():
        return read_adapter(location, transformer_only=transformer_only)
    repo, revision = named.groups()
    try:
        folder = download(repo, revision, _WANTED, otherwise=_OTHERWISE)
        file = _adapter_in(folder) or _only_file(repo, folder)
    except ModelError as error:
        hint = f"; a weight is written {repo}@{revision}" if re.fullmatch(r"[\d.]+", revision or "") else ""
        raise AdapterError(*(f"--lora {problem}{hint}" for problem in error.problems)) from None
    adapter = read_adapter(file, transformer_only=transformer_only)
    return replace(adapter, origin=f"{repo}:{folder.name}", base_in_card=_base_in_card(folder / CARD))


def _adapter_in(folder: Path) -> Path | None:
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def _only_file(repo: str, folder: Path) -> Path:
    """Return the only safetensors file of a repository, of any name, as other tools upload it."""
    try:
        names = files_in_root(repo, folder.name, _OTHERWISE)
    except ModelError:
        names = [path.name for path in folder.iterdir()]  # the cached files may be enough
        if not any(map(is_safetensors, names)):
            raise
    files = list(filter(is_safetensors, names))
    if len(files) != 1:
        held = f"none of {', '.join(files)} is named so" if files else "it holds no .safetensors file"
        raise AdapterError(
            f"--lora {repo}: no {ADAPTER_FILE} in this repository, and {held}; download the one you want"
        )
    return download(repo, folder.name, [glob.escape(files[0])], otherwise=_OTHERWISE) / files[0]


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
