"""Safetensors files without torch: the files of a part, their headers, and a digest from few small reads."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3tune.errors import ModelError
from sd3tune.files.json import NotJson, read_object
from sd3tune.files.regular import MAX_NAME_BYTES
from sd3tune.files.tensor_header import BadHeader, read_header

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
"""Extensions of weights that are never loaded, as a pickle can run any code."""

_SAMPLE_BYTES = 4096
_ONE = {
    "F64": struct.pack("<d", 1),
    "F32": struct.pack("<f", 1),
    "F16": struct.pack("<e", 1),
    "BF16": struct.pack("<f", 1)[2:],
    "F8_E4M3": b"\x38",
    "F8_E5M2": b"\x3c",
}
"""The bytes of 1.0 in each dtype."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that diffusers and transformers load from a part's folder, without variants.

    Raises ModelError if there are none, or if a shard named by the index is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        # With both present, transformers ("model") loads the single file and diffusers the shards.
        if index.is_file() and not (stem == "model" and single.is_file()):
            shards = [folder / shard for shard in _shards(index)]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing or not shards:
                raise ModelError(f"{index}: names weights that are missing: {', '.join(missing) or 'all of them'}")
            return shards
        if single.is_file():
            return [single]
    pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in PICKLED]
    variants = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if variants:
        hint = f"; {variants[0]} is a variant: give it the plain name, or save the model without a variant"
    elif pickled:
        hint = f"; {pickled[0]} is pickled and is refused, as it can run any code: save it as safetensors"
    else:
        hint = " (pickled ones are never loaded)"
    raise ModelError(f"{folder}: no safetensors weights here{hint}")


def refuse_adapter(folder: Path) -> None:
    """Raise ModelError for a part with an adapter in its folder, which transformers would load unasked."""
    names = [path.name for path in sorted(folder.glob("adapter_*"))]
    found = [name for name in names if name.startswith(("adapter_config.", "adapter_model."))]
    if found:
        raise ModelError(
            f"{folder / found[0]}: an adapter inside a base, which would change this part unasked; move it elsewhere "
            "(--lora and method.start_from take adapters)"
        )


def _shards(index: Path) -> list[str]:
    """Return the files that an index names, in its folder."""
    found = read_json(index).get("weight_map", {})
    names = list(found.values()) if isinstance(found, dict) else [found]
    odd = [name for name in names if not _is_shard_name(name)]
    if odd:
        raise ModelError(f"{index}: weight_map: {json.dumps(odd[0])[:60]} is no safetensors file beside it")
    return sorted(set(names))


def _is_shard_name(name: Any) -> bool:
    if not isinstance(name, str) or "/" in name or not name.endswith(".safetensors"):
        return False
    return len(name.encode(errors="surrogatepass")) <= MAX_NAME_BYTES


def tensor_headers(file: Path) -> dict[str, dict[str, Any]]:
    """Return name -> {"dtype", "shape", "data_offsets"} of a safetensors file; offsets count from the file's start.

    Raises ModelError if the file is truncated or not a safetensors file.
    """
    try:
        return read_header(file).tensors
    except BadHeader as error:
        size = file.stat().st_size
        raise ModelError(
            f"{file}: truncated or not a safetensors file ({size} bytes, {error}); get the file again"
        ) from None


def is_identity(file: Path, tensor: Mapping[str, Any]) -> bool:
    """Return True if a tensor, given by its header, is exactly the identity matrix. Reads it row by row."""
    one, shape = _ONE.get(tensor["dtype"]), tensor["shape"]
    if one is None or len(shape) != 2 or shape[0] != shape[1]:
        return False
    side, size = shape[0], len(one)
    with file.open("rb") as stream:
        stream.seek(tensor["data_offsets"][0])
        return all(
            stream.read(side * size) == bytes(row * size) + one + bytes((side - row - 1) * size) for row in range(side)
        )


def digest(texts: Iterable[tuple[str, bytes]], tensors: Iterable[tuple[Path, str]] = ()) -> str:
    """Return a hex digest of (name, content) pairs, and of the tensors of (file, prefix) pairs with that prefix.

    A tensor contributes its name without the prefix, dtype, shape, and first and last 4 KiB, so an edit in the middle
    of a large tensor is missed. The digest does not depend on paths, times, the files' order or sharding.
    """
    hasher = hashlib.sha256()
    for name, content in texts:
        _add(hasher, name.encode(), content)
    for sample in sorted(sample for file, prefix in tensors for sample in _samples(file, prefix)):
        _add(hasher, *sample)
    return hasher.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ModelError."""
    try:
        return read_object(path)
    except NotJson as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None


def _add(hasher: Any, *items: bytes) -> None:
    for item in items:
        hasher.update(struct.pack("<Q", len(item)) + item)


def _samples(file: Path, prefix: str) -> Iterator[tuple[bytes, bytes, bytes]]:
    with file.open("rb") as stream:
        for name, tensor in tensor_headers(file).items():
            if not name.startswith(prefix):
                continue
            begin, end = tensor["data_offsets"]
            stream.seek(begin)
            head = stream.read(min(_SAMPLE_BYTES, end - begin))
            stream.seek(max(begin, end - _SAMPLE_BYTES))
            tail = stream.read(min(_SAMPLE_BYTES, end - begin))
            yield name.removeprefix(prefix).encode(), f"{tensor['dtype']} {tensor['shape']}".encode(), head + tail
