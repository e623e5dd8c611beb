"""Modules of the original layout, which kohya's and ComfyUI's files use, and their counterparts in diffusers.

It fuses q, k and v into one module, and has the halves of two modulations in the other order (shift before scale).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sd3tune.adapter.contents import Pair
from sd3tune.adapter.layouts import FUSED, IN_BLOCK, OUTSIDE, PARTS_OF_FUSED
from sd3tune.adapter.lycoris import LOHA, LOKR, rank_of, rows_of, scaled, size_of, with_halves_swapped

ORIGINAL_OF = {theirs: original for original, theirs in (*IN_BLOCK.items(), *OUTSIDE.items())}
DIFFUSERS_OF = {**IN_BLOCK, **OUTSIDE, **PARTS_OF_FUSED}
FUSED_OF = {part: (fused, parts.index(part)) for fused, parts in FUSED.items() for part in parts}


def cut(module: str, container: str) -> tuple[str, str]:
    """Split `joint_blocks.3.x_block.mlp.fc1` into `joint_blocks.3.` and the rest; outside of blocks the first is ''."""
    found = re.fullmatch(rf"({container}\.\d+\.)(.+)", module)
    return (found[1], found[2]) if found else ("", module)


def renamed(container: str) -> str:
    return container.replace("joint_blocks", "transformer_blocks")


def diffusers_names(module: str) -> list[str]:
    """Return diffusers' names of a module of the original layout: three for a fused one."""
    container, inside = cut(module, "joint_blocks")
    names = FUSED.get(inside) or (DIFFUSERS_OF[inside],)
    return [f"{renamed(container)}{name}" for name in names]


def is_swapped(original: str, outputs: int, inputs: int) -> bool:
    """Return True for a module, named inside a block or in full, whose halves diffusers has in the other order.

    That applies to the final layer, and to the last block's text stream, recognized by having only these two.
    """
    of_last = original.endswith("context_block.adaLN_modulation.1") and outputs == 2 * inputs
    return (original == "final_layer.adaLN_modulation.1" or of_last) and outputs % 2 == 0


def lycoris_pieces(module: str, parts: Mapping[str, Tensor], original: bool) -> dict[str, dict[str, Tensor]] | str:
    """Return diffusers' names of a LoHa or LoKr module with their parts, the scale multiplied in; or its fault.

    The parts are faultless matrices (see `lycoris_fault`).
    """
    rank = rank_of(parts)
    scale = parts["alpha"].item() / rank if "alpha" in parts and rank is not None else 1.0
    whole = scaled({part: tensor for part, tensor in parts.items() if part in (*LOHA, *LOKR)}, scale)
    names, (outputs, inputs) = diffusers_names(module) if original else [module], size_of(whole)
    if outputs % len(names):
        return f"{outputs} rows cannot be cut into q, k and v"
    if len(names) > 1:
        return {name: rows_of(whole, number, len(names)) for number, name in enumerate(names)}
    return {names[0]: with_halves_swapped(whole) if original and is_swapped(module, outputs, inputs) else whole}


def magnitude_pieces(module: str, magnitude: Tensor, size: tuple[int, int], original: bool) -> dict[str, Tensor] | str:
    """Return diffusers' names of a module with DoRA's magnitude, [out] or [1, in]; or its fault.

    `size` is (outputs, inputs) of each of them.
    """
    names, (outputs, inputs) = diffusers_names(module) if original else [module], size
    rows = outputs * len(names)
    if magnitude.shape in ((rows,), (rows, 1)):
        halves = (
            magnitude.flatten().chunk(2)[::-1] if original and is_swapped(module, outputs, inputs) else (magnitude,)
        )
        return dict(zip(names, torch.cat(halves).flatten().chunk(len(names)), strict=True))
    if magnitude.shape != (1, inputs):
        return f"its DoRA magnitude has shape {list(magnitude.shape)}, which fits neither its outputs nor its inputs"
    if len(names) > 1:
        return "its DoRA magnitude is one per input of q, k and v together, which cannot be cut into three"
    return {names[0]: magnitude}


def magnitude_of(module: str, magnitudes: Mapping[str, Tensor], original: bool, inputs: int) -> Tensor:
    """Return DoRA's magnitude [out] of a module in a layout, from magnitudes by diffusers' names."""
    whole = torch.cat([magnitudes[name] for name in (diffusers_names(module) if original else [module])])
    return torch.cat(whole.chunk(2)[::-1]) if original and is_swapped(module, len(whole), inputs) else whole


def fused_parts(modules: Iterable[str]) -> list[str]:
    """Return all parts of the fused modules of which `modules` are parts, and the other modules."""
    found: list[str] = []
    for module in modules:
        container, inside = cut(module, "transformer_blocks")
        fused = FUSED_OF.get(inside) if container else None
        found += [f"{container}{part}" for part in FUSED[fused[0]]] if fused else [module]
    return list(dict.fromkeys(found))


def fused_ranks(factors: Mapping[str, Pair]) -> dict[str, list[int]]:
    """Return fused module of the original layout -> ranks of its q, k and v; 0 for a part without adapter."""
    ranks: dict[str, list[int]] = {}
    for module, (down, _) in factors.items():
        container, inside = cut(module, "transformer_blocks")
        if container and inside in FUSED_OF:
            name, number = FUSED_OF[inside]
            ranks.setdefault(f"{container}{name}", [0, 0, 0])[number] = len(down)
    return ranks
