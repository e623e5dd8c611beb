"""The conditioning contract: the inference settings of a trained model or adapter, which `infer` applies.

An adapter has it in its metadata, a whole model as `sd3tune.json` beside `model_index.json`. No time, host or path is
in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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


class _Contract(Part):
    contract_version: int = Field(CONTRACT_VERSION, ge=1)
    name: str | None = None
    trigger: str | None = None
    instance_prompt: str | None = None
    base: str | None = None
    base_released_as: str | None = None
    base_kind: Literal["tiny", "nano", "hub", "folder", "file"] | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    resolution: int = Field(1024, ge=16, le=4096, multiple_of=16)
    max_sequence_length: int = Field(256, ge=1, le=512)
    encoders: list[Literal["clip_l", "clip_g", "t5"]] = Field(default=["clip_l", "clip_g"], min_length=2)
    noise_offset: float = Field(0.0, ge=0, allow_inf_nan=False)
    sampler_noise_offset: float = Field(0.0, ge=0, le=1)
    encoder_files: dict[Literal["clip_l", "clip_g", "t5"], _EncoderFile] = Field(default={})
    sampling_steps: int = Field(EARLIER_STEPS, ge=1, le=1000)
    guidance: float = Field(EARLIER_GUIDANCE, ge=0, allow_inf_nan=False)
    quantize: Literal["none", "nf4", "int8"] = "none"
    t5_quantize: Literal["none", "int8"] = "none"
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    weights: Literal["raw", "ema"] | None = None
    shift: float | None = Field(None, gt=0, allow_inf_nan=False)
    sigma_range: list[_Share] = Field([0.0, 1.0], min_length=2, max_length=2)
    timesteps: _Variant | None = None
    weighting: _Variant | None = None
    loss: _Variant | None = None
    buckets: bool | None = None
    caption_dropout: _Share = 0.0
    encoder_dropout: _Share = 0.0
    seed: int = Field(0, ge=0, lt=2**63)
    rank: int | None = Field(None, ge=1)
    alpha: float | None = Field(None, allow_inf_nan=False)
    tag_frequency: dict[str, int] | None = None


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
    check_part(where, contract, _Contract, error)
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
