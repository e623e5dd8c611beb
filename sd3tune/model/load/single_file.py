"""Load a part of a model from a single safetensors file, by the libraries' own converters."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from safetensors import safe_open
from torch import Tensor

from sd3tune.errors import ModelError
from sd3tune.model.base.parts import COMMON, CONFIGS
from sd3tune.model.base.single_file_header import FilePart, is_quantisation

_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_BUNDLED = {SD3Transformer2DModel: CONFIGS / "sd3-medium" / "transformer", AutoencoderKL: COMMON / "vae"}


def from_file(model_class: Any, part: FilePart, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """Return the model on the CPU in `dtype`, and the names of `missing` and `mismatched` tensors, by kind."""
    tensors = read_tensors(part, dtype)
    if model_class not in _BUNDLED:
        return _text_encoder(model_class, part, tensors, dtype)
    config = {key: value for key, value in part.config.items() if not key.startswith("_")}
    # Keywords override the bundled config. `single_file_header` has checked that the transformer is complete.
    if model_class is AutoencoderKL and (missing := _missing_in_vae(config, tensors)):
        return None, {"missing": missing}
    with without_tables():
        model = model_class.from_single_file(
            tensors, config=str(_BUNDLED[model_class]), torch_dtype=dtype, local_files_only=True, **config
        )
    return model, {}


def without_tables() -> torch.device:
    """Return a context in which diffusers builds a model without computing its buffers, as the file holds them.

    Otherwise the table of positions of SD3.5-medium takes 4.5 s on one core, and 4 to 6 GB of memory.
    """
    return torch.device("meta")


def _missing_in_vae(config: dict[str, Any], tensors: dict[str, Tensor]) -> list[str]:
    """Return the tensors that `from_single_file` would leave without a value; its own error does not name them."""
    with torch.device("meta"):
        expected = AutoencoderKL(**config).state_dict()
    return sorted(set(expected) - set(convert_ldm_vae_checkpoint(dict(tensors), config)))


def read_tensors(part: FilePart, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the part's tensors by name without prefix: memory-mapped as stored, but fp8 converted to `dtype`.

    `part.unused` is left out. Scaled fp8 weights are multiplied by their scale. Raises ModelError for other quantised
    formats.
    """
    with safe_open(part.file, framework="pt") as file:
        names = {name for name in file.keys() if name.startswith(part.prefix)}  # noqa: SIM118  (not a mapping)
        tensors = {}
        unused = {name for name in names if name.removeprefix(part.prefix) in part.unused}
        for name in sorted(name for name in names - unused if not is_quantisation(name.removeprefix(part.prefix))):
            tensor = file.get_tensor(name)
            stem = name.removesuffix("weight")
            scales = [scale for scale in (f"{stem}scale_weight", f"{stem}weight_scale") if scale in names]
            if tensor.dtype in _FP8 or scales:
                tensor = _decoded(part, name, tensor, [file.get_tensor(scale) for scale in scales], dtype)
            if tensor.is_floating_point():
                tensors[name.removeprefix(part.prefix)] = tensor
            elif not name.endswith("position_ids"):
                raise _unreadable(part, name, tensor)
    return tensors


def _decoded(part: FilePart, name: str, tensor: Tensor, scales: list[Tensor], dtype: torch.dtype) -> Tensor:
    if tensor.dtype not in _FP8 or any(scale.numel() != 1 for scale in scales):
        raise _unreadable(part, name, tensor)
    return (tensor.float() * scales[0].float()).to(dtype) if scales else tensor.to(dtype)


def _unreadable(part: FilePart, name: str, tensor: Tensor) -> ModelError:
    stored = str(tensor.dtype).removeprefix("torch.")
    return ModelError(
        f"{part.file}: {name} is quantised ({stored}) in a way that cannot be read; get the file in fp16, bf16 or fp8"
    )


def _text_encoder(
    model_class: Any, part: FilePart, tensors: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Any, dict[str, list[str]]]:
    config = model_class.config_class.from_dict(dict(part.config))
    if config.model_type == "t5":
        second_name = tensors.pop("encoder.embed_tokens.weight", None)
        if second_name is not None:
            tensors.setdefault("shared.weight", second_name)
    else:
        tensors.setdefault("text_projection.weight", torch.eye(config.projection_dim))
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return model, {kind: [str(key) for key in info[f"{kind}_keys"]] for kind in ("missing", "mismatched")}
