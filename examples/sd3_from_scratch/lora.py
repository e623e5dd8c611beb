"""7. LoRA: a small correction of a large matrix (Hu et al. 2021).

Fine-tuning changes a matrix W only a little, and mostly in few directions. So W stays as it is, and W + B A is used
instead, with a low A [r, in] and a narrow B [out, r]. At rank 16 these are 2 % of a matrix of SD3.5 medium.
"""

import json
import math
import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.sd3_from_scratch.checkpoint import MMDIT, ours
from examples.sd3_from_scratch.mmdit import MMDiT, Projections

NAMES = {
    "image.attention.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"], "image.attention.out": ["attn.to_out.0"],
    "text.attention.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "text.attention.out": ["attn.to_add_out"],
    "image.second.qkv": ["attn2.to_q", "attn2.to_k", "attn2.to_v"], "image.second.out": ["attn2.to_out.0"],
}  # fmt: skip
"""Our matrix -> the matrices of diffusers that it consists of."""


class Lora(nn.Module):
    """A linear layer and its corrections: of a joint matrix, one each for queries, keys and values."""

    def __init__(self, linear: nn.Linear, rank: int, parts: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.a = nn.ParameterList(torch.empty(rank, linear.in_features) for _ in range(parts))
        self.b = nn.ParameterList(torch.zeros(linear.out_features // parts, rank) for _ in range(parts))
        for a in self.a:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # B is 0, so training begins at W itself

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + torch.cat([x @ a.T @ b.T for a, b in zip(self.a, self.b, strict=True)], dim=-1)


def add_lora(model: MMDiT, rank: int) -> list[nn.Parameter]:
    """Put a LoRA on all projections of all attentions; return the numbers to train."""
    model.requires_grad_(False)
    for module in [one for one in model.modules() if isinstance(one, Projections)]:
        module.qkv = Lora(module.qkv, rank, parts=3)
        if module.out is not None:
            module.out = Lora(module.out, rank, parts=1)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def save_lora(model: MMDiT, file: Path) -> None:
    """Write the corrections in diffusers' names, which diffusers, ComfyUI and sd3tune load."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Lora):
            block, matrix = re.fullmatch(r"blocks\.(\d+)\.(.*)", name).groups()
            for theirs, a, b in zip(NAMES[matrix], module.a, module.b, strict=True):
                at = f"transformer.transformer_blocks.{block}.{theirs}"
                found |= {f"{at}.lora_A.weight": a.detach(), f"{at}.lora_B.weight": b.detach()}
    save_file(found, file)


@torch.no_grad()
def merge_lora(model: MMDiT, file: Path) -> None:
    """Add the corrections of a file in diffusers' names to a model's matrices. Fails for a matrix that is not there."""
    with safe_open(file, "pt") as opened:
        found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        settings = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
    scale = settings.get("transformer.lora_alpha", 1) / settings.get("transformer.r", 1)
    matrices = dict(model.named_parameters())
    for name in [one for one in found if one.endswith("lora_A.weight")]:
        correction = scale * found[name.replace("lora_A", "lora_B")] @ found[name]
        whole, part = ours(name.removeprefix("transformer.").replace("lora_A.", ""), MMDIT)
        matrix = matrices[whole]
        matrix[part * len(correction) :][: len(correction)] += correction.to(matrix)
