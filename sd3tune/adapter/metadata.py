"""Reading an adapter's metadata, which is checked because other tools write it too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd3tune.errors import AdapterError
from sd3tune.files import json as json_files
from sd3tune.files.tensor_header import MOST_BYTES
from sd3tune.model.base.contract import WAY_OUT, check_contract

CONTRACT_KEY, PEFT_KEY = "sd3tune", "lora_adapter_metadata"
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
