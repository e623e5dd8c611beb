"""Reproducible safetensors files, and digests of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd3tune.files.tensor_header import read_header


def save_sorted(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file with equal bytes for equal tensors and metadata.

    safetensors sorts tensors but writes metadata in random order, so the header is sorted afterwards.
    """
    save_file(dict(tensors), path, metadata=dict(metadata) if metadata else None)
    if metadata and len(metadata) > 1:
        _sort_metadata(path)


def tensors_sha256(path: Path) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of a file's tensors, without its metadata.

    Raises OSError, and SafetensorError for a file of another kind.
    """
    hashed = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            hashed.update(f"{json.dumps(name)} {tensor.dtype} {list(tensor.shape)}\n".encode())
            hashed.update(_bytes(tensor))
    return hashed.hexdigest()


def digest(tensor: Tensor) -> str:
    """Return the XXH3-128 of a tensor's dtype, shape and bytes, in hex. It detects damage, not forgery."""
    hashed = xxhash.xxh3_128(f"{tensor.dtype} {list(tensor.shape)}".encode())
    hashed.update(_bytes(tensor))
    return hashed.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a complete file in place: the header keeps its length, the tensors their offsets."""
    header = read_header(path, plain=False)
    encoded = replace(header, metadata=dict(sorted(header.metadata.items()))).encode()
    if len(encoded) != header.length:
        raise RuntimeError(f"{path}: the sorted header is not as long as the one that safetensors wrote")
    with path.open("r+b") as file:
        file.write(encoded)
