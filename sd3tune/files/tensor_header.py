"""The header of a safetensors file, fully checked before the file is used; without torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.files.json import NotJson, parse_object
from sd3tune.files.regular import Refused, open_regular

MOST_BYTES = 32 * 2**20
"""Size limit of a header: a whole SD3.5 checkpoint's has half a megabyte, an adapter's with a picture a few."""
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
_MOST_DIMENSIONS = 8


class BadHeader(ValueError):
    """A truncated file, or not a safetensors file; the message has the reason."""


@dataclass(frozen=True)
class Header:
    """A parsed safetensors header."""

    metadata: dict[str, str]
    tensors: dict[str, dict[str, Any]]
    """Name -> {"dtype", "shape", "data_offsets"}, in the file's order; offsets count from the file's start."""
    length: int
    """Bytes of the file before the tensors."""

    def encode(self) -> bytes:
        """Return the bytes before the tensors, as safetensors writes them; other metadata can change their number."""
        tensors = {
            name: {**tensor, "data_offsets": [offset - self.length for offset in tensor["data_offsets"]]}
            for name, tensor in self.tensors.items()
        }
        header = {"__metadata__": self.metadata, **tensors} if self.metadata else tensors
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format aligns the tensors
        return len(text).to_bytes(8, "little") + text


def read_header(file: Path, plain: bool = True) -> Header:
    """Read the header of a safetensors file, whose tensors must fill the file without gaps.

    `plain` is as in `json_files.parse`. Raises BadHeader, and OSError for a file that cannot be read.
    """
    try:
        with open_regular(file, largest=None) as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > size - 8:
                raise BadHeader(f"its header needs {length} bytes" if size >= 8 else "no valid header: it is too short")
            if length > MOST_BYTES:
                raise BadHeader(f"its header has {length} bytes, more than the {MOST_BYTES} that are read")
            text = stream.read(length)
    except Refused as error:
        raise BadHeader(f"it {error.strerror}") from None
    try:
        header = parse_object(text, MOST_BYTES, plain)
    except NotJson as error:
        raise BadHeader(f"no valid header: {error}") from None
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadHeader("no valid header: its metadata are not keys and texts")
    tensors = {name: _tensor(name, tensor, 8 + length) for name, tensor in header.items()}
    _check_places(tensors, 8 + length, size)
    return Header(metadata, tensors, 8 + length)


def _tensor(name: str, tensor: Any, start: int) -> dict[str, Any]:
    fields = tensor if isinstance(tensor, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or offsets is None or len(shape) > _MOST_DIMENSIONS or len(offsets) != 2:
        raise BadHeader(f"no valid header: {ascii(name)[:200]} has no shape or no place")
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise BadHeader(f"no valid header: {ascii(name)[:200]} has the unknown dtype {ascii(dtype)[:40]}")
    if (offsets[1] - offsets[0]) * 8 != math.prod(shape) * bits:
        raise BadHeader(f"no valid header: {ascii(name)[:200]} has other bytes than its shape needs")
    return {"dtype": dtype, "shape": shape, "data_offsets": [start + offset for offset in offsets]}


def _sizes(values: Any) -> list[int] | None:
    """Return the value if it is a list of non-negative integers, else None."""
    return values if isinstance(values, list) and all(type(value) is int and value >= 0 for value in values) else None


def _check_places(tensors: dict[str, dict[str, Any]], start: int, size: int) -> None:
    end = start
    for begin, following in sorted(tensor["data_offsets"] for tensor in tensors.values()):
        if begin != end:
            raise BadHeader(f"no valid header: its tensors {'overlap' if begin < end else 'leave a gap'}")
        end = following
    if end != size:
        raise BadHeader(f"its header describes {end} bytes")
