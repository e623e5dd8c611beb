"""What was read of image files before, so that planning a large folder again opens no image.

These are hints for planning: an entry applies while path, length and time of change of the file are the same. Encodings
never go by times: the keys of their entries are digests of the content, and encoding decodes every new image.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sd3tune.data.images import ImageRef, check_header, file_of
from sd3tune.errors import RunError
from sd3tune.files.atomic import write_bytes
from sd3tune.files.regular import read_regular

_NAME = "headers.safetensors"
_FEWEST = 1000
"""Number of new entries from which they are written: fewer are read again in a moment."""
_MOST = 2_000_000
"""Limit on the entries of the file, 17 bytes each; the oldest are dropped."""

_Size = tuple[int, int]


class Headers:
    """The sizes that a file in a store's folder remembers, and those that were read since. Thread-safe."""

    def __init__(self, folder: Path | None = None) -> None:
        self._path = None if folder is None else folder / _NAME
        self._sizes, self._decoded = _read(self._path)
        self._new = 0

    def size_of(self, image: ImageRef) -> _Size:
        """Return (height, width) of the upright image as `check_header` does, which opens only unknown files.

        Raises DataError.
        """
        key = self.key_of(image)
        known = None if key is None else self._sizes.get(key)
        if known is not None:
            return known
        size = check_header(image)
        if key is not None:
            self._sizes[key] = size
            self._new += 1
        return size

    def key_of(self, image: ImageRef) -> int | None:
        """Return the key of a file as it is now; None for other images, and if nothing is remembered."""
        path = None if self._path is None else file_of(image)
        if path is None:
            return None
        try:
            found = path.stat()
        except (OSError, ValueError):
            return None
        state = f"{path.absolute()}\0{found.st_size}\0{found.st_mtime_ns}"
        return xxhash.xxh3_64_intdigest(state.encode(errors="replace"))

    def is_decoded(self, key: int | None) -> bool:
        """Return True if this file was decoded before, and gave no reason for a warning."""
        return key in self._decoded

    def add_decoded(self, key: int | None) -> None:
        """Remember that a file, whose size is known, was decoded and gave no reason for a warning."""
        if key in self._sizes:
            self._decoded.add(key)
            self._new += 1

    def save(self) -> None:
        """Write the file if there are many new entries. A failure is ignored: they are then read again.

        Of two processes that write at once, the later one wins.
        """
        if self._path is None or self._new < _FEWEST:
            return
        sizes, decoded = self._sizes, self._decoded
        for key in list(sizes)[:-_MOST]:
            del sizes[key]
        tensors: dict[str, np.ndarray] = {
            "keys": np.fromiter(sizes, np.uint64, len(sizes)),
            "sizes": np.array(list(sizes.values()), np.uint32),
            "decoded": np.fromiter((key in decoded for key in sizes), np.uint8, len(sizes)),
        }
        with contextlib.suppress(OSError, RunError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(self._path, save(tensors))
            self._new = 0

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Return True if a store's folder remembers any."""
        return (folder / _NAME).exists()

    @staticmethod
    def forget(folder: Path) -> None:
        """Delete the file."""
        with contextlib.suppress(OSError):
            (folder / _NAME).unlink()


def _read(path: Path | None) -> tuple[dict[int, _Size], set[int | None]]:
    """Return key -> size, and the keys of the decoded files; empty if the file is missing or damaged."""
    try:
        tensors = {} if path is None else load(read_regular(path))
        keys, sizes, decoded = (tensors[name] for name in ("keys", "sizes", "decoded"))
    except (OSError, SafetensorError, KeyError, ValueError):
        return {}, set()
    shapes, dtypes = (keys.shape, sizes.shape), [str(tensor.dtype) for tensor in (keys, sizes, decoded)]
    if shapes != (decoded.shape, (len(keys), 2)) or dtypes != ["uint64", "uint32", "uint8"] or not sizes.all():
        return {}, set()
    once: dict[_Size, _Size] = {}  # a large set has few sizes
    shared = (once.setdefault((height, width), (height, width)) for height, width in sizes.tolist())
    return dict(zip(keys.tolist(), shared, strict=True)), set(keys[decoded == 1].tolist())
