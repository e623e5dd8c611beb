"""The samples of a shard: files of a tar with one name up to its first dot, in WebDataset's convention."""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from sd3tune.config.sections.data import Source
from sd3tune.data.formats import EXTENSIONS
from sd3tune.data.sources.metadata import clean
from sd3tune.data.written import READERS, Listed, Written, column_of
from sd3tune.errors import DataError
from sd3tune.files.json import NotJson, parse_object
from sd3tune.files.regular import LARGEST, Refused
from sd3tune.files.text import NotText, decode

_TEXTS = (".txt", ".caption")
_LONGEST_JSON = 2**24


@dataclass(frozen=True)
class Member:
    """A file in an open tar."""

    file: BinaryIO = field(repr=False, compare=False)
    """The tar, which stays open as long as a member of it is in use."""
    place: str
    """Shard and name, for messages."""
    name: str
    offset: int
    nbytes: int

    def __str__(self) -> str:
        return self.place

    def read_bytes(self) -> bytes:
        """Return the file's bytes; thread-safe. Raises OSError."""
        if self.nbytes > LARGEST:
            raise Refused(f"has {self.nbytes:,} bytes, and at most {LARGEST:,} are read")
        data = os.pread(self.file.fileno(), self.nbytes, self.offset)
        while len(data) < self.nbytes:  # a read may end early, at 2 GiB or by a signal
            more = os.pread(self.file.fileno(), self.nbytes - len(data), self.offset + len(data))
            if not more:
                raise Refused("ends early, as its shard is cut off")
            data += more
        return data


Sample = Mapping[str, Member]
"""Extension in lower case -> file."""


def samples_of(file: BinaryIO, shard: str) -> tuple[list[tuple[str, Sample]], str | None]:
    """Return (name, files) of each sample of a tar in its order, and what is wrong with the tar, None if nothing."""
    found: dict[str, dict[str, Member]] = {}
    wrong = None
    try:
        file.seek(0)
        with tarfile.open(fileobj=file, mode="r:") as opened:
            for entry in opened:
                folder, base = posixpath.split(entry.name)
                stem, dot, extension = base.partition(".")
                if entry.isreg() and stem and dot:
                    member = Member(file, f"{shard}/{entry.name}", entry.name, entry.offset_data, entry.size)
                    found.setdefault(posixpath.join(folder, stem), {})[f".{extension.lower()}"] = member
    except (tarfile.TarError, OSError, EOFError) as error:
        wrong = f"{shard}: is no whole tar file ({error or type(error).__name__}); samples after the fault are missing"
    return list(found.items()), wrong


def image_of(sample: Sample) -> Member | None:
    """Return the image of a sample: the first file with an image's extension; None without one."""
    return next((member for extension, member in sample.items() if extension.endswith(EXTENSIONS)), None)


def captions_of(sample: Sample, source: Source) -> Listed:
    """Return the captions of a sample; None if it has none. Raises DataError."""
    listed: dict[str, tuple[str, ...]] = {}
    values = _json(sample[".json"]) if ".json" in sample else {}
    names: dict[str, str] = {reader: column_of(reader) for reader in READERS}
    names["text"] = getattr(source, "caption_field", "text")
    for name, key in names.items():
        listed[name] = _texts(sample[".json"], key, values[key]) if values.get(key) is not None else ()
    texts = next((sample[extension] for extension in _TEXTS if extension in sample), None)
    if texts is not None:
        listed["text"] = tuple(filter(None, [clean(_text(texts))]))
    elif not listed["text"] and ".cls" in sample:
        listed["text"] = _class_name(sample[".cls"], getattr(source, "class_names", None))
    return Written(**listed).plain


def _text(member: Member) -> str:
    try:
        return decode(member.read_bytes(), member.place)
    except OSError as error:
        raise DataError(f"{member}: {error.strerror or error}") from None
    except NotText as error:
        raise DataError(str(error)) from None


def _json(member: Member) -> dict[str, Any]:
    try:
        return parse_object(_text(member), _LONGEST_JSON)
    except (NotJson, ValueError) as error:
        raise DataError(f"{member}: is no JSON object ({error})") from None


def _texts(member: Member, key: str, value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{member}: {key} is neither a text nor a list of texts")
    return tuple(filter(None, map(clean, texts)))


def _class_name(member: Member, names: list[str] | None) -> tuple[str, ...]:
    text = _text(member).strip()
    if names is None:
        raise DataError(f"{member}: is a class, which has no name; set class_names")
    if not (text.isascii() and text.isdigit()) or int(text) >= len(names):
        raise DataError(f"{member}: the class is {text[:20]!r}, and class_names has 0 to {len(names) - 1}")
    return (names[int(text)],)
