"""What an adapter's metadata may say, as far as it is read; checked, as others write it, too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from sd3tune.errors import AdapterError
from sd3tune.model.contract import WAY_OUT, Part, check_contract, check_part

CONTRACT_KEY, PEFT_KEY = "sd3tune", "lora_adapter_metadata"
PREFIX = "transformer."


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


class _Peft(Part):
    use_dora: bool | None = None
    use_rslora: bool | None = None
    lora_alpha: float | None = None
    alpha_pattern: dict[Annotated[str, AfterValidator(_compiles)], float] | None = None


def read_contract(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The conditioning contract of a file; empty when another tool wrote it. Raises AdapterError."""
    contract = _parse(path, metadata, CONTRACT_KEY)
    check_contract(f"{path}: its metadata {CONTRACT_KEY!r}", contract, AdapterError)
    return contract


def read_peft(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT needs to rebuild the layers, its keys without `transformer.`; empty without. Raises AdapterError."""
    peft = {key.removeprefix(PREFIX): value for key, value in _parse(path, metadata, PEFT_KEY).items()}
    check_part(f"{path}: its metadata {PEFT_KEY!r}", peft, _Peft, AdapterError)
    return peft


def _parse(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: its metadata {key!r} is not valid JSON: {error}{WAY_OUT}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: its metadata {key!r} is {json.dumps(value)[:60]}, not keys and values{WAY_OUT}")
    return value
