"""A record of the files encoded into a store, used to explain why a file is encoded again."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path

from sd3tune.data.colour import Reading
from sd3tune.data.images import PREPROCESSING_VERSION
from sd3tune.errors import RunError
from sd3tune.files.atomic import write_json
from sd3tune.files.own_json import read_object

_NAME = "manifest.json"


@dataclass(frozen=True)
class ImageFacts:
    """Facts about an image file: its SHA-256, and the (height, width) of the upright image."""

    digest: str
    size: tuple[int, int]
    reading: Reading | None = None
    """How the pixels were read; None if only earlier versions, which did not record it, read the image."""

    @property
    def mark(self) -> str:
        """The reading's part of the store key; empty for most images."""
        return self.reading.mark if self.reading else ""


@dataclass
class Manifest:
    """The last encoding of each image, by the absolute path of a file, or the dataset and number of a row.

    It never replaces reading a file: every pass computes the digests again, and recorded facts apply only to bytes with
    the recorded digest.
    """

    images: dict[str, ImageFacts] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    """Digests of all texts ever encoded, prompts included."""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Load the manifest of a store's folder; return an empty one if there is none or it cannot be read."""
        try:
            content = read_object(folder / _NAME)
            readings = {digest: _reading(*of) for digest, of in content.get("readings", {}).items()}
            images = {path: _facts(readings, *of) for path, of in content["images"].items()}
            captions, texts = dict(content["captions"]), set(content["texts"])
            same_sizes = content["preprocessing"] == PREPROCESSING_VERSION
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return cls()
        typed = all(isinstance(text, str) for text in (*captions.values(), *texts))
        return cls(images if same_sizes else {}, captions, texts) if typed else cls()

    def knows_text(self, text: str) -> bool:
        """Return True if this text was ever encoded, with any settings."""
        return _digest(text) in self.texts

    @classmethod
    def add(
        cls,
        folder: Path,
        *,
        images: Mapping[str, ImageFacts] | None = None,
        captions: Mapping[str, str] | None = None,
        texts: Iterable[str] = (),
    ) -> None:
        """Merge these entries into the file. A failure is ignored, as it only makes the next report less precise."""
        now = cls.load(folder)
        now.images.update(images or {})
        now.captions.update(captions or {})
        now.texts.update(map(_digest, texts))
        content = {
            "preprocessing": PREPROCESSING_VERSION,
            "images": {path: [facts.digest, *facts.size] for path, facts in sorted(now.images.items())},
            "readings": {
                facts.digest: list(astuple(facts.reading)) for _, facts in sorted(now.images.items()) if facts.reading
            },
            "captions": dict(sorted(now.captions.items())),
            "texts": sorted(now.texts),
        }
        with contextlib.suppress(OSError, RunError):
            write_json(folder / _NAME, content)

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete the file, so that the next encodings count as new."""
        with contextlib.suppress(OSError):
            (folder / _NAME).unlink()


def _reading(mark: object, transparent: object, trouble: object) -> Reading:
    if not (isinstance(mark, str) and isinstance(transparent, bool) and isinstance(trouble, str)):
        raise TypeError
    return Reading(mark, transparent, trouble)


def _facts(readings: Mapping[str, Reading], digest: object, height: object, width: object) -> ImageFacts:
    if not (isinstance(digest, str) and type(height) is type(width) is int and min(height, width) > 0):
        raise TypeError
    return ImageFacts(digest, (height, width), readings.get(digest))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
