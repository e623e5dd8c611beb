"""Transformers of the released sizes with random weights on their device, and the operations of their steps."""

from __future__ import annotations

import math
from functools import partial

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from benchmarks.cells import RANK, Model
from benchmarks.gpu.cells import T5_TOKENS, Cell, Shapes
from benchmarks.peer.cells import LEARNING_RATE, TARGETS
from sd3tune.config import Config
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.methods import LoraMethod
from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import shape_of_base
from sd3tune.model.load.components import empty_transformer
from sd3tune.model.load.quantized import quantize


def config_of(cell: Cell, shapes: Shapes) -> Config:
    """Return sd3tune's configuration of a cell: LoRA on the modules that the example trains."""
    return Config.model_validate(
        {
            "name": "gpu",
            "model": {"base": shapes.bases[cell.base], "dtype": "bf16", "max_sequence_length": T5_TOKENS},
            "method": {"kind": "lora", "rank": RANK, "alpha": float(RANK), "targets": list(TARGETS)},
            "data": {"sources": [{"kind": "folder", "path": "random"}], "resolution": cell.pixels},
            "optimizer": {"kind": "adamw", "lr": LEARNING_RATE},
            "train": {
                "batch_size": cell.batch,
                "gradient_checkpointing": cell.checkpointing,
            },
        }
    )


def model_of(cell: Cell, shapes: Shapes, device: torch.device) -> Model:
    """Return the cell's frozen transformer, to be built on `device`, and the sizes of its inputs."""
    base = shape_of_base(config_of(cell, shapes).model)
    widths = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
    return Model(
        cell.name,
        partial(_build, base, device=device, nf4=cell.precision == "nf4"),
        cell.pixels // 8,
        {encoder: base.config(part)["hidden_size"] for encoder, part in widths.items()},
    )


def flops_of(cell: Cell, shapes: Shapes) -> int:
    """Return the operations that a step needs, without recomputation; counted on the meta device."""
    plain = Cell(cell.base, cell.pixels, 1)
    config = config_of(plain, shapes)
    base = shape_of_base(config.model)
    size = (cell.pixels, cell.pixels)
    return cell.batch * rehearse_training(config, base, LoraMethod(config), size, torch.bfloat16).flops


def _build(base: Base, dtype: torch.dtype, *, device: torch.device, nf4: bool) -> SD3Transformer2DModel:
    transformer = random_on_device(empty_transformer(base), dtype, device)
    if nf4:
        quantize(transformer, transformer.transformer_blocks, "nf4", device)
    return transformer


@torch.no_grad()
def random_on_device(empty: SD3Transformer2DModel, dtype: torch.dtype, device: torch.device) -> SD3Transformer2DModel:
    """Draw random weights of unit gain for a model on the meta device, directly on `device`, without host memory."""
    transformer = nn.Module.to(empty, dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, tensor in transformer.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=1 / math.sqrt(tensor[0].numel()))
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)  # RMS norms
    return transformer
