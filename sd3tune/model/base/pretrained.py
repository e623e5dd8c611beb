"""Models beside the base, in transformers' format: from the Hub, at a commit, or from a local folder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sd3tune.errors import ModelError
from sd3tune.model.base.hub import download

_ON_THE_HUB = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?", re.ASCII)
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "*.model"]
_WEIGHTS = (["model*.safetensors"], ["pytorch_model*.bin"])
"""The preferred format first. transformers reads a .bin file with `weights_only=True`, which runs no code."""


@dataclass(frozen=True)
class ModelSource:
    """A model that is not loaded yet."""

    name: str
    """Hub id, or local folder in transformers' format."""
    revision: str | None = None

    @property
    def label(self) -> str:
        """The name with its revision."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


def model_source(text: str) -> ModelSource:
    """Return the model of a local folder, or of a Hub id with or without `@revision`.

    An existing folder is preferred to a Hub id of the same spelling.
    """
    named = None if Path(text).expanduser().exists() else _ON_THE_HUB.fullmatch(text)
    return ModelSource(text) if named is None else ModelSource(named[1], named[2])


def folder_of(source: ModelSource, otherwise: str) -> Path:
    """Return the folder of a model, downloaded if needed. Raises ModelError, which suggests `otherwise`."""
    local = Path(source.name).expanduser()
    if source.revision is None and local.exists():
        return local
    for weights in _WEIGHTS:
        folder = download(source.name, source.revision, [*_SMALL_FILES, *weights], progress=True, otherwise=otherwise)
        if any(folder.glob(weights[0])):
            return folder
    raise ModelError(f"{source.label}: no weights in safetensors or PyTorch's format there; {otherwise}")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' bars and its reports, such as on tensors that are left out."""
    from transformers.utils import logging

    from sd3tune.model.base.progress_bars import no_progress_bars

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(before)
