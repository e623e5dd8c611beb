"""Adapter files of LoHa and LoKr, with PEFT's names of their parts, which ComfyUI reads, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lycoris_utils import LycorisConfig

from sd3tune.adapter.file import ADAPTER_FILE, check_finite, write_described
from sd3tune.adapter.lycoris import Parts
from sd3tune.adapter.metadata import PREFIX

_STATED = ("r", "rank_pattern", "decompose_both", "decompose_factor")
"""The keys of PEFT's configuration that the shapes of the parts follow from."""


def write_lycoris(
    folder: Path,
    modules: Mapping[str, Parts],
    config: LycorisConfig,
    contract: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` from parts with the scale in the first one, in `dtype`.

    Raises AdapterError, before anything is written, if a tensor is not finite.
    """
    tensors = {
        f"{PREFIX}{module}.{part}": value.detach().to("cpu", dtype).contiguous()
        for module, parts in modules.items()
        for part, value in parts.items()
    }
    check_finite(folder, tensors, dtype)
    return write_described(folder / ADAPTER_FILE, tensors, lycoris_metadata(config), contract)


def lycoris_metadata(config: LycorisConfig) -> str:
    """Return PEFT's configuration of the layers, as metadata, with alpha = rank in each."""
    stated = {key: value for key in _STATED if (value := getattr(config, key, None))}
    special = {"alpha_pattern": config.rank_pattern} if config.rank_pattern else {}
    modules = {"target_modules": sorted(config.target_modules), "alpha": config.r}
    return json.dumps({PREFIX + key: value for key, value in {**stated, **modules, **special}.items()}, sort_keys=True)
