"""What an adapter's metadata may say, as far as it is read; checked, as others write it, too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sd3tune.errors import AdapterError

CONTRACT_VERSION = 1
CONTRACT_KEY, PEFT_KEY = "sd3tune", "lora_adapter_metadata"
PREFIX = "transformer."


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


class _Part(BaseModel):
    """Keys that are not named here are let through."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class _EncoderFile(_Part):
    file: str
    fingerprint: str


class _Contract(_Part):
    contract_version: int = Field(CONTRACT_VERSION, ge=1)
    base: str | None = None
    base_kind: Literal["tiny", "nano", "hub", "folder", "file"] | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    resolution: int = Field(1024, ge=16, multiple_of=16)
    max_sequence_length: int = Field(256, ge=1, le=512)
    encoders: list[Literal["clip_l", "clip_g", "t5"]] = Field(default=["clip_l", "clip_g"], min_length=2)
    encoder_files: dict[Literal["clip_l", "clip_g", "t5"], _EncoderFile] = Field(default={})


class _Peft(_Part):
    use_dora: bool | None = None
    use_rslora: bool | None = None
    lora_alpha: float | None = None
    alpha_pattern: dict[Annotated[str, AfterValidator(_compiles)], float] | None = None


def read_contract(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """The conditioning contract of a file; empty when another tool wrote it. Raises AdapterError."""
    contract = _parse(path, metadata, CONTRACT_KEY)
    version = contract.get("contract_version", 1)
    if isinstance(version, int) and version > CONTRACT_VERSION:
        raise AdapterError(f"{path}: written by a newer sd3tune ({contract.get('sd3tune_version')}); upgrade sd3tune")
    _check(path, CONTRACT_KEY, contract, _Contract)
    if contract.get("base_fingerprint") is not None and contract.get("base") is None:
        raise AdapterError(f"{path}: its metadata {CONTRACT_KEY!r}: base: missing{_WAY_OUT}")
    if "encoders" in contract and not {"clip_l", "clip_g"} <= set(contract["encoders"]):
        raise AdapterError(f"{path}: its metadata {CONTRACT_KEY!r}: encoders: lacks clip_l or clip_g{_WAY_OUT}")
    return contract


def read_peft(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """What PEFT needs to rebuild the layers, its keys without `transformer.`; empty without. Raises AdapterError."""
    peft = {key.removeprefix(PREFIX): value for key, value in _parse(path, metadata, PEFT_KEY).items()}
    _check(path, PEFT_KEY, peft, _Peft)
    return peft


_WAY_OUT = "; the file was changed or damaged, get it again"


def _parse(path: Path, metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: its metadata {key!r} is not valid JSON: {error}{_WAY_OUT}") from None
    if not isinstance(value, dict):
        raise AdapterError(f"{path}: its metadata {key!r} is {json.dumps(value)[:60]}, not keys and values{_WAY_OUT}")
    return value


def _check(path: Path, key: str, value: Mapping[str, Any], model: type[_Part]) -> None:
    try:
        model.model_validate(value)
    except ValidationError as error:
        raise AdapterError(
            *(
                f"{path}: its metadata {key!r}: {'.'.join(map(str, found['loc']))}: {found['msg']}, "
                f"not {json.dumps(found['input'])[:60]}{_WAY_OUT}"
                for found in error.errors()
            )
        ) from None
