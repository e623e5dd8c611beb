"""The layouts of LoRA files for SD3: which names other tools give to the transformer's modules, and what they fuse.

diffusers' names are ours. The original layout (kohya's and ComfyUI's) holds q, k and v in one module, and the halves of
two modulations in the other order (shift before scale). There a fused LoRA is block-diagonal: A stacks those of q, k
and v, 3r rows, and B has theirs along its diagonal. Ranks that differ are padded with zeros to the largest, so that
tools which cut the file in three find equal parts; reading takes the zeros away again. A LoRA that was trained on the
fused module has one A for all three, and becomes three that share it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sd3tune.errors import AdapterError

Pair = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r] of a module."""

_IN_BLOCK = {
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
}
_FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_OUTSIDE = {
    "context_embedder": "context_embedder",
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_ORIGINAL_NAMES = (*_IN_BLOCK, *_FUSED, *_OUTSIDE)
_DIFFUSERS_NAMES = (*_IN_BLOCK.values(), *(part for parts in _FUSED.values() for part in parts), *_OUTSIDE.values())
_ORIGINAL_OF = {theirs: original for original, theirs in (*_IN_BLOCK.items(), *_OUTSIDE.items())}
_FUSED_OF = {part: (fused, parts.index(part)) for fused, parts in _FUSED.items() for part in parts}


@dataclass(frozen=True)
class Layout:
    """How a tool writes the name of a module."""

    name: str
    prefix: str
    original: bool = False
    """Whether modules are those of the original layout rather than diffusers'."""
    flat: bool = False
    """Whether dots are underscores."""


LAYOUTS = (
    Layout("diffusers", "transformer."),
    Layout("PEFT", "base_model.model."),
    Layout("ComfyUI", "diffusion_model.", original=True),
    Layout("kohya", "lora_unet_", original=True, flat=True),
    Layout("OneTrainer", "lora_transformer_", flat=True),
    Layout("LyCORIS", "lycoris_", flat=True),
)
"""All that are read: those that ComfyUI's loader knows for SD3."""

READABLE = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
"""What the factors of a LoRA may be stored in."""

_KEY = re.compile(r"(.+)\.(?:(?:lora_(A|B|down|up))(?:\.default)?\.weight|(alpha))")
_HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_FOREIGN = (  # in this order: what a key of no known layout tells
    (r"dora_scale|lora_magnitude_vector", "DoRA, which is not supported yet"),
    (r"\.(hada|lokr)_|\.lora_mid|\.(a1|b1)\.weight", "LoHa, LoKr or another kind of adapter than LoRA"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "differences of whole weights, which is no LoRA"),
    (r"^(lora_te\d?_|text_encoder|lora_prior_te)", "for the text encoders, which sd3tune leaves as they are"),
    (r"x_embedder|pos_embed", "for the patch embedder, a convolution, and only linear layers can be adapted"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "for another architecture (Flux or the like)"),
    (r"down_blocks|up_blocks|mid_block|(in|out)put_blocks|middle_block", "for a Stable Diffusion 1, 2 or XL model"),
)


@dataclass(frozen=True)
class Contents:
    """What the tensors of a file come to, good or bad."""

    layout: str
    """A name of LAYOUTS; empty when no key is of any."""
    factors: dict[str, Pair]
    """diffusers' module name -> factors."""
    alphas: dict[str, float]
    """Of the modules for which a tensor says it; the output is scaled by alpha / r."""
    unknown: dict[str, str]
    """Key -> what it seems to be for, of those that belong to no module of SD3's transformer."""
    broken: dict[str, str]
    """Module as the file names it -> what is wrong with it."""


def interpret(tensors: Mapping[str, Tensor]) -> Contents:
    """Sort a file's tensors into modules with diffusers' names; nothing is raised, all that is odd is told."""
    stored: dict[tuple[Layout, str], dict[str, Tensor]] = {}
    unknown: dict[str, str] = {}
    for key, tensor in tensors.items():
        found = _locate(key)
        if found is None:
            unknown[key] = foreign(key)
        else:
            layout, module, part = found
            stored.setdefault((layout, module), {})[part] = tensor
    contents = Contents(next((layout.name for layout, _ in stored), ""), {}, {}, unknown, {})
    for (layout, module), parts in stored.items():
        fault = _fault(parts) or _add(contents, layout, module, parts)
        if fault:
            contents.broken[module] = fault
    return contents


def foreign(key: str) -> str:
    """What a key that belongs to no module seems to be for; empty when that is anyone's guess."""
    return next((what for pattern, what in _FOREIGN if re.search(pattern, key)), "")


def arrange(factors: Mapping[str, Pair], layout: str) -> dict[str, Tensor]:
    """Tensors by key of the layout (diffusers, kohya or comfyui) of factors whose scale is folded into B, fp32.

    Raises AdapterError for a module that the layout has no place for.
    """
    if layout == "diffusers":
        return {
            f"transformer.{module}.lora_{letter}.weight": _plain(factor)
            for module, pair in factors.items()
            for letter, factor in zip("AB", pair, strict=True)
        }
    tensors: dict[str, Tensor] = {}
    for module, (down, up) in _to_original(factors).items():
        if layout == "kohya":
            name = "lora_unet_" + module.replace(".", "_")
            tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = _plain(down), _plain(up)
            tensors[f"{name}.alpha"] = torch.tensor(float(len(down)))
        else:
            name = f"diffusion_model.{module}"
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = _plain(down), _plain(up)
    return tensors


def fused_ranks(factors: Mapping[str, Pair]) -> dict[str, list[int]]:
    """Fused module of the original layout -> ranks of its q, k and v; 0 for one that is not adapted."""
    ranks: dict[str, list[int]] = {}
    for module, (down, _) in factors.items():
        container, inside = _cut(module, "transformer_blocks")
        if container and inside in _FUSED_OF:
            name, number = _FUSED_OF[inside]
            ranks.setdefault(f"{container}{name}", [0, 0, 0])[number] = len(down)
    return ranks


def _locate(key: str) -> tuple[Layout, str, str] | None:
    """Layout, module (dotted, as the layout names it) and part (`A`, `B` or `alpha`) of a key."""
    found = _KEY.fullmatch(key)
    layout = next((layout for layout in LAYOUTS if key.startswith(layout.prefix)), None)
    if not found or not layout:
        return None
    module: str | None = found[1].removeprefix(layout.prefix)
    if layout.flat or layout.original:
        module = _known_name(found[1].removeprefix(layout.prefix), layout)
    return (layout, module, _HALVES[found[2]] if found[2] else "alpha") if module else None


def _known_name(name: str, layout: Layout) -> str | None:
    """The dotted name of a module that the layout knows, given as the layout writes it."""
    container, names = (
        ("joint_blocks", _ORIGINAL_NAMES) if layout.original else ("transformer_blocks", _DIFFUSERS_NAMES)
    )
    write: Callable[[str], str] = (lambda text: text.replace(".", "_")) if layout.flat else str
    in_block = re.fullmatch(rf"{container}[._](\d{{1,3}})[._](.+)", name)
    inside = in_block[2] if in_block else name
    dotted = next((known for known in names if write(known) == inside), None)
    if dotted is None or (in_block is None) != _stands_alone(dotted):
        return None
    return f"{container}.{in_block[1]}.{dotted}" if in_block else dotted


def _stands_alone(dotted: str) -> bool:
    return dotted in _OUTSIDE or dotted in _OUTSIDE.values()


def _fault(parts: Mapping[str, Tensor]) -> str | None:
    if [parts[letter].ndim for letter in "AB" if letter in parts] != [2, 2] or len(parts["A"]) != parts["B"].shape[1]:
        return "lora_A and lora_B are not a pair of matrices of one rank"
    if not min(*parts["A"].shape, *parts["B"].shape):
        return "lora_A or lora_B is empty"
    odd = next((tensor for tensor in parts.values() if tensor.dtype not in READABLE), None)
    if odd is not None:
        return f"{str(odd.dtype).removeprefix('torch.')} is no type for the weights of a LoRA"
    if "alpha" in parts and parts["alpha"].numel() != 1:
        return "its alpha is not a number"
    return None


def _add(contents: Contents, layout: Layout, module: str, parts: Mapping[str, Tensor]) -> str | None:
    """Add a module to the contents under diffusers' names; returns what is wrong with it, if anything."""
    down, up = (_widened(parts[letter]) for letter in "AB")
    scale = parts["alpha"].item() / len(down) if "alpha" in parts else None
    if not layout.original:
        pieces: dict[str, Pair] = {module: (down, up)}
    elif module.endswith(".qkv") and len(up) % 3:
        return f"{len(up)} rows cannot be cut into q, k and v"
    else:
        pieces = _from_original(module, down, up)
    twice = next((name for name in pieces if name in contents.factors), None)
    if twice:
        return f"{twice} is in the file twice"
    contents.factors.update(pieces)
    if scale is not None:
        contents.alphas.update({name: scale * len(piece[0]) for name, piece in pieces.items()})
    return None


def _from_original(module: str, down: Tensor, up: Tensor) -> dict[str, Pair]:
    container, inside = _cut(module, "joint_blocks")
    if inside not in _FUSED:
        name = _IN_BLOCK.get(inside) or _OUTSIDE[inside]
        return {f"{_renamed(container)}{name}": (down, _swapped(inside, down, up))}
    names = [f"{_renamed(container)}{name}" for name in _FUSED[inside]]
    ups = up.chunk(3)
    if len(down) % 3 or not _is_block_diagonal(up):
        return {name: (down, own) for name, own in zip(names, ups, strict=True)}
    pieces = {
        name: _without_zeros(a, own.chunk(3, dim=1)[place])
        for place, (name, a, own) in enumerate(zip(names, down.chunk(3), ups, strict=True))
    }
    return {name: piece for name, piece in pieces.items() if len(piece[0])}


def _to_original(factors: Mapping[str, Pair]) -> dict[str, Pair]:
    modules: dict[str, Pair] = {}
    fused: dict[str, dict[int, Pair]] = {}
    for module, (down, up) in factors.items():
        container, inside = _cut(module, "transformer_blocks")
        place = container.replace("transformer_blocks", "joint_blocks")
        if container and inside in _FUSED_OF:
            name, number = _FUSED_OF[inside]
            fused.setdefault(f"{place}{name}", {})[number] = (down, up)
            modules.setdefault(f"{place}{name}", (down, up))  # keeps its place in the order
        elif inside in _ORIGINAL_OF and bool(container) != _stands_alone(inside):
            name = _ORIGINAL_OF[inside]
            modules[f"{place}{name}"] = (down, _swapped(name, down, up))
        else:
            raise AdapterError(f"{module}: the original layout has no such linear layer, so neither kohya's nor "
                               "ComfyUI's files can hold it")  # fmt: skip
    return modules | {name: _joined(name, parts) for name, parts in fused.items()}


def _joined(name: str, parts: Mapping[int, Pair]) -> Pair:
    """q, k and v (0, 1, 2) as one module, block-diagonal unless they share their A; one that is missing is zero."""
    if len({(down.shape[1], len(up)) for down, up in parts.values()}) > 1:
        raise AdapterError(f"{name}: q, k and v are of different sizes, which one fused module cannot be")
    first_down, first_up = next(iter(parts.values()))
    if len(parts) == 3 and all(torch.equal(down, first_down) for down, _ in parts.values()):
        return first_down, torch.cat([parts[number][1] for number in range(3)])
    rank, width = max(len(down) for down, _ in parts.values()), len(first_up)
    joined_down = first_down.new_zeros(3 * rank, first_down.shape[1])
    joined_up = first_up.new_zeros(3 * width, 3 * rank)
    for number, (down, up) in parts.items():
        joined_down[number * rank : number * rank + len(down)] = down
        joined_up[number * width : (number + 1) * width, number * rank : number * rank + len(down)] = up
    return joined_down, joined_up


def _is_block_diagonal(up: Tensor) -> bool:
    blocks = [rows.chunk(3, dim=1) for rows in up.chunk(3)]
    return not any(blocks[row][column].any() for row in range(3) for column in range(3) if row != column)


def _without_zeros(down: Tensor, up: Tensor) -> Pair:
    """Without the ranks of which both sides are zero: what padding adds."""
    kept = down.any(dim=1) | up.any(dim=0)
    return down[kept], up[:, kept]


def _swapped(original: str, down: Tensor, up: Tensor) -> Tensor:
    """B with shift and scale exchanged where diffusers has them in the other order.

    That is at the end, and in the last block's text stream, which is told by having these two only.
    """
    two = original == "final_layer.adaLN_modulation.1" or (
        original == "context_block.adaLN_modulation.1" and len(up) == 2 * down.shape[1]
    )
    return torch.cat(up.chunk(2)[::-1]) if two and len(up) % 2 == 0 else up


def _cut(module: str, container: str) -> tuple[str, str]:
    """`joint_blocks.3.x_block.mlp.fc1` -> `joint_blocks.3.`, `x_block.mlp.fc1`; outside of blocks the first is ''."""
    found = re.fullmatch(rf"({container}\.\d+\.)(.+)", module)
    return (found[1], found[2]) if found else ("", module)


def _renamed(container: str) -> str:
    return container.replace("joint_blocks", "transformer_blocks")


def _widened(factor: Tensor) -> Tensor:
    """Eight-bit floats can be stored, but not computed with."""
    return factor.float() if factor.element_size() == 1 else factor


def _plain(factor: Tensor) -> Tensor:
    return factor.detach().float().cpu().contiguous().clone()


def first_of(names: Iterable[str]) -> str:
    """`a and 2 more`."""
    known = list(names)
    return shown(known[0]) + (f" and {len(known) - 1} more" if len(known) > 1 else "")


def shown(text: str) -> str:
    """What a stranger's file says, on one line of a terminal."""
    plain = text if text.isprintable() else ascii(text)
    return plain if len(plain) <= 200 else plain[:200] + "..."
