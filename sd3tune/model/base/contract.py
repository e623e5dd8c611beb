"""The conditioning contract: the inference settings of a trained model or adapter, which `infer` applies.

An adapter has it in its metadata, a whole model as `sd3tune.json` beside `model_index.json`. No time, host or path is
in it. `Contract` declares its keys for the code that writes, checks and merges contracts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sd3tune.errors import UserError
from sd3tune.files.json import dotted

CONTRACT_VERSION = 1
CONTRACT_FILE = "sd3tune.json"
EARLIER_STEPS, EARLIER_GUIDANCE = 28, 7.0
"""Settings for files of earlier versions, which contain neither."""
WAY_OUT = "; the file was changed or damaged, get it again"


class Part(BaseModel):
    """A checked part of a JSON object; unknown keys are allowed."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


_Share = Annotated[float, Field(ge=0, le=1)]


class _Variant(Part):
    """A registered variant by its name; later versions may add names."""

    kind: str


class _EncoderFile(Part):
    file: str
    fingerprint: str


class _Concept(Part):
    name: str
    trigger: str | None = None


@dataclass(frozen=True)
class ContractKey:
    """The meaning of a contract's key, beside its type."""

    merged: bool
    """True for an inference setting, which a merged adapter takes from the first one; False for a fact of one training,
    which it does not have."""
    difference: str | None = None
    """The words of the warning about a merge of adapters with different values; None for no warning."""


SETTING, FACT = ContractKey(merged=True), ContractKey(merged=False)


class Contract(Part):
    """All keys of a contract, but for those of a method's section, which declares them (see `config.sections.key`)."""

    contract_version: Annotated[int, FACT] = Field(CONTRACT_VERSION, ge=1)
    sd3tune_version: Annotated[Any, FACT] = None
    name: Annotated[str | None, FACT] = None
    trigger: Annotated[str | None, FACT] = None
    instance_prompt: Annotated[str | None, FACT] = None
    base: Annotated[str | None, SETTING] = None
    base_released_as: Annotated[str | None, SETTING] = None
    base_kind: Annotated[Literal["tiny", "nano", "hub", "folder", "file"] | None, SETTING] = None
    base_revision: Annotated[str | None, SETTING] = None
    base_fingerprint: Annotated[str | None, ContractKey(merged=True, difference="another base")] = None
    resolution: Annotated[int, SETTING] = Field(1024, ge=16, le=4096, multiple_of=16)
    resolutions: Annotated[list[int], FACT] = Field(default=[])
    max_sequence_length: Annotated[int, ContractKey(merged=True, difference="another T5 length")] = Field(
        256, ge=1, le=512
    )
    t5_lengths: Annotated[Any, FACT] = None
    encoders: Annotated[
        list[Literal["clip_l", "clip_g", "t5"]], ContractKey(merged=True, difference="other text encoders")
    ] = Field(default=["clip_l", "clip_g"], min_length=2)
    noise_offset: Annotated[float, FACT] = Field(0.0, ge=0, allow_inf_nan=False)
    sampler_noise_offset: Annotated[float, FACT] = Field(0.0, ge=0, le=1)
    input_perturbation: Annotated[float, FACT] = Field(0.0, ge=0, le=1)
    encoder_files: Annotated[dict[Literal["clip_l", "clip_g", "t5"], _EncoderFile], SETTING] = Field(default={})
    sampling_steps: Annotated[int, SETTING] = Field(EARLIER_STEPS, ge=1, le=1000)
    guidance: Annotated[float, SETTING] = Field(EARLIER_GUIDANCE, ge=0, allow_inf_nan=False)
    quantize: Annotated[Literal["none", "nf4", "int8"], FACT] = "none"
    t5_quantize: Annotated[Literal["none", "int8"], FACT] = "none"
    dtype: Annotated[Literal["fp32", "bf16", "fp16"] | None, FACT] = None
    weights: Annotated[Literal["raw", "ema"] | None, FACT] = None
    shift: Annotated[float | None, SETTING] = Field(None, gt=0, allow_inf_nan=False)
    sigma_range: Annotated[list[_Share], FACT] = Field([0.0, 1.0], min_length=2, max_length=2)
    timesteps: Annotated[_Variant | None, FACT] = None
    weighting: Annotated[_Variant | None, FACT] = None
    loss: Annotated[_Variant | None, FACT] = None
    buckets: Annotated[bool | None, SETTING] = None
    caption_dropout: Annotated[_Share, FACT] = 0.0
    encoder_dropout: Annotated[_Share, FACT] = 0.0
    seed: Annotated[int, FACT] = Field(0, ge=0, lt=2**63)
    method: Annotated[Any, FACT] = None
    init: Annotated[Any, FACT] = None
    start_from: Annotated[Any, FACT] = None
    merged: Annotated[Any, FACT] = None
    rank: Annotated[int | None, FACT] = Field(None, ge=1)
    alpha: Annotated[float | None, FACT] = Field(None, allow_inf_nan=False)
    tag_frequency: Annotated[dict[str, int] | None, FACT] = None
    concepts: Annotated[list[_Concept], FACT] = Field(default=[])
    own_texts: Annotated[list[Literal["clip", "t5"]], FACT] = Field(default=[])


def _declarations() -> dict[str, ContractKey]:
    """Return key -> its declaration. Raises TypeError for a field of `Contract` without one."""
    found = {
        name: next((of for of in field.metadata if isinstance(of, ContractKey)), None)
        for name, field in Contract.model_fields.items()
    }
    silent = [name for name, key in found.items() if key is None]
    if silent:
        raise TypeError(f"contract: {', '.join(silent)}: declares no ContractKey; add SETTING or FACT")
    return {name: key for name, key in found.items() if key is not None}


CONTRACT_KEYS = _declarations()
"""Key -> its declaration, in the order of `Contract`."""


def declared(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return `values`, which a contract will state. Raises KeyError for keys that `Contract` does not declare."""
    if unknown := values.keys() - CONTRACT_KEYS.keys():
        raise KeyError(f"contract: {', '.join(sorted(unknown))}: not declared; add a field to Contract")
    return values


def starting_offset(contract: Mapping[str, Any]) -> float:
    """Return the noise offset for sampling; 0 for contracts of earlier versions, which sampled without one."""
    offset: float = contract.get("sampler_noise_offset", 0.0)
    return offset


def spread_without_offset(strength: float, side: int) -> float:
    """Return the share of the spread of brightness that remains when sampling lacks the training's noise offset.

    The mean of a channel of a square latent of n positions has variance 1/n in plain noise, and 1/n + strength^2 in
    training. The flow scales it from noise to images, so 1 / sqrt(1 + strength^2 n) of the spread remains. `side` is in
    pixels.
    """
    return (1 + strength**2 * (side / 8) ** 2) ** -0.5


def check_contract(where: str, contract: Mapping[str, Any], error: type[UserError]) -> None:
    """Raise `error` for a contract that cannot be applied; `where` begins each line."""
    version = contract.get("contract_version", 1)
    if isinstance(version, int) and version > CONTRACT_VERSION:
        raise error(f"{where}: written by a newer sd3tune ({contract.get('sd3tune_version')}); upgrade sd3tune")
    check_part(where, contract, Contract, error)
    if contract.get("base_fingerprint") is not None and contract.get("base") is None:
        raise error(f"{where}: base: missing{WAY_OUT}")
    if "encoders" in contract and not {"clip_l", "clip_g"} <= set(contract["encoders"]):
        raise error(f"{where}: encoders: lacks clip_l or clip_g{WAY_OUT}")


def sampling_of(contract: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `steps` and `guidance` of a run's previews, as a mapping."""
    return {
        "steps": contract.get("sampling_steps", EARLIER_STEPS),
        "guidance": float(contract.get("guidance", EARLIER_GUIDANCE)),
    }


def check_part(where: str, value: Mapping[str, Any], model: type[Part], error: type[UserError]) -> None:
    """Raise `error` with a line for each key of `value` that does not fit `model`; `where` begins each line."""
    try:
        model.model_validate(value)
    except ValidationError as found:
        raise error(
            *(
                f"{where}: {dotted(problem['loc'])}: "
                + (
                    "missing"
                    if problem["type"] == "missing"
                    else f"{problem['msg']}, not {json.dumps(problem['input'])[:60]}"
                )
                + WAY_OUT
                for problem in found.errors()
            )
        ) from None
