"""A record of the files that were encoded into a store, from which a report explains what is encoded again."""

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
    """What a file's bytes determine: their SHA-256, and the upright image's (height, width)."""

    digest: str
    size: tuple[int, int]
    reading: Reading | None = None
    """How the pixels were read; None as long as no version that tells has looked."""

    @property
    def mark(self) -> str:
        """Part of the store key, empty for most images."""
        return self.reading.mark if self.reading else ""


@dataclass
class Manifest:
    """The last encoding of each image: a file by its absolute path, a row by its dataset and number.

    It never replaces reading a file: every pass computes digests again, and a recorded size counts only for bytes with
    the recorded digest.
    """

    images: dict[str, ImageFacts] = field(default_factory=dict)
    captions: dict[str, str] = field(default_factory=dict)
    texts: set[str] = field(default_factory=set)
    """Digests of all texts ever encoded, prompts included."""

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a store's folder; an empty one when there is none that can be read."""
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
        """Return whether this text was ever encoded, with any settings."""
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
        """Merge these into the file. A failure is ignored: it only costs a reason in the next report."""
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
