"""Reading a safetensors file and its metadata, which is checked because other tools write it too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sd3tune.adapter.names import CONTRACT_KEY as CONTRACT_KEY
from sd3tune.errors import AdapterError
from sd3tune.files import json as json_files
from sd3tune.files.tensor_header import MOST_BYTES, BadHeader, read_header
from sd3tune.model.base.contract import WAY_OUT, check_contract

PEFT_KEY = "lora_adapter_metadata"
PREFIX = "transformer."


def read_contract(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the conditioning contract of a file; empty if another tool wrote it. Raises AdapterError."""
    where = f"{path}: its metadata {CONTRACT_KEY!r}"
    contract = parse_object(where, metadata.get(CONTRACT_KEY, "{}"))
    check_contract(where, contract, AdapterError)
    return contract


def parse_object(where: str, text: str) -> dict[str, Any]:
    """Return the keys and values of a JSON object. Raises AdapterError, a line that begins with `where`."""
    try:
        value = json_files.parse(text, MOST_BYTES)
    except json_files.NotJson as error:
        raise AdapterError(f"{where} is not valid JSON: {error}{WAY_OUT}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{where} is {json.dumps(value)[:60]}, not keys and values{WAY_OUT}")
    return value


def is_safetensors(name: str) -> bool:
    """Return True if a file's name ends with `.safetensors`, in any case."""
    return name.lower().endswith(".safetensors")


def read_tensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file of `what`, in the plural. Raises AdapterError."""
    if not is_safetensors(path.name):
        raise AdapterError(f"{path}: {what} are read as safetensors only; pickled files can run any code")
    try:
        metadata = read_header(path).metadata
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, metadata  # noqa: SIM118  (not a mapping)
    except (BadHeader, SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file: {error}") from error
