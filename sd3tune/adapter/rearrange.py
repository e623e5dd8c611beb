"""The layouts of LoRA files for SD3: fused modules and exchanged halves; their names are in `layouts`.

In memory, names are diffusers'. The original layout (kohya's and ComfyUI's) fuses q, k and v into one module, and has
the halves of two modulations in the other order (shift before scale). A fused LoRA is block-diagonal: A stacks the
three A, 3r rows, and B has the three B along its diagonal. Different ranks are padded with zeros to the largest,
because some tools cut the file into three equal parts; reading removes the padding. A LoRA trained on the fused module
has one A, which its three parts share.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sd3tune.adapter.contents import Contents, Pair
from sd3tune.adapter.layouts import (
    DORA_SCALE,
    FUSED,
    PATCH_EMBEDDER,
    Layout,
    foreign,
    forms,
    locate,
    stands_alone,
    text_encoder_of,
)
from sd3tune.adapter.lycoris import Parts, is_lycoris, lycoris_fault, rank_of
from sd3tune.adapter.original import (
    DIFFUSERS_OF,
    FUSED_OF,
    ORIGINAL_OF,
    cut,
    diffusers_names,
    is_swapped,
    lycoris_pieces,
    magnitude_of,
    magnitude_pieces,
    renamed,
)
from sd3tune.adapter.text_layouts import is_text, locate_text, written_text
from sd3tune.errors import AdapterError

_PATCH_EMBEDDERS = (PATCH_EMBEDDER, "x_embedder.proj")
_PATCH = 2
"""Side of a patch, in latents, in every SD3 model."""

READABLE = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
)
"""Dtypes in which a LoRA's factors may be stored."""


def interpret(tensors: Mapping[str, Tensor]) -> Contents:
    """Sort a file's tensors into modules with diffusers' names. Faults are returned, not raised."""
    stored: dict[tuple[Layout, str], dict[str, Tensor]] = {}
    unknown: dict[str, str] = {}
    text: dict[str, str] = {}
    text_stored: dict[str, dict[str, tuple[str, Tensor]]] = {}
    twice: dict[str, str] = {}
    for key, tensor in tensors.items():
        found, encoder = locate(key), text_encoder_of(key)
        if found is not None:
            layout, module, part = found
            parts = stored.setdefault((layout, module), {})
            if part in parts:
                twice[module] = "is in the file twice: it holds several adapters"
            parts[part] = tensor
        elif encoder is not None:
            text[key] = encoder
            if (located := locate_text(key)) is not None:
                text_stored.setdefault(located[0], {})[located[1]] = key, tensor
        else:
            unknown[key] = foreign(key)
    name = next((layout.name for layout, _ in stored), "")
    own = ("transformer.", "text_encoder.", "text_encoder_2.")
    for_diffusers = name == "diffusers" and all(key.startswith(own) for key in tensors)
    contents = Contents(name, {}, {}, unknown, {}, text, {}, dict(text), for_diffusers)
    for module, of_module in text_stored.items():
        _add_text(contents, module, of_module)
    for (layout, module), parts in stored.items():
        plain = _as_matrices(module, parts)
        check, add = (lycoris_fault, _add_lycoris) if is_lycoris(parts) else (_fault, _add)
        fault = twice.get(module) or check(plain) or _type_fault(plain) or add(contents, layout, module, plain)
        fault = fault or _add_magnitude(contents, layout, module, plain)
        if fault:
            contents.broken[module] = fault
    if contents.lycoris:  # text encoders' LoRA beside another kind is not loaded
        contents.text_factors.clear()
        contents.unread.update(text)
    return contents


def _add_text(contents: Contents, module: str, stored: Mapping[str, tuple[str, Tensor]]) -> None:
    """Add a text encoder's module to the contents, unless it is faulty: its keys then stay unread."""
    parts = {half: tensor for half, (_, tensor) in stored.items()}
    if parts.keys() - {"A", "B", "alpha"} or _fault(parts):
        return
    contents.text_factors[module] = _widened(parts["A"]), _widened(parts["B"])
    if "alpha" in parts:
        contents.alphas[module] = parts["alpha"].item()
    for key, _ in stored.values():
        del contents.unread[key]


def arrange(factors: Mapping[str, Pair], layout: str, magnitudes: Mapping[str, Tensor] = {}) -> dict[str, Tensor]:
    """Return key -> tensor (fp32) in a layout, a name of `layouts.forms`, for factors whose scale is folded into B.

    Names of text encoders' modules begin with their folder (see `text_layouts`). DoRA's `magnitudes`, [out] by
    diffusers' names, must include the parts of each fused module (see `fused_parts`). Raises AdapterError for a module
    that the layout cannot express.
    """
    target = forms()[layout]
    tensors: dict[str, Tensor] = {}
    text = {module: pair for module, pair in factors.items() if is_text(module)}
    own = {module: pair for module, pair in factors.items() if module not in text}
    own = _to_original(own) if target.original else own
    named = [(target.written(module), module, pair) for module, pair in own.items()]
    named += [(written_text(module, layout), module, pair) for module, pair in text.items()]
    for name, module, pair in named:
        for half, factor in zip(target.halves, as_stored(module, pair), strict=True):
            tensors[f"{name}.{half}.weight"] = _plain(factor)
        if target.writes_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(len(pair[0])))
        if magnitudes and not is_text(module):
            of_module = magnitude_of(module, magnitudes, target.original, pair[0].shape[1])
            column = of_module[:, None] if target.magnitude == DORA_SCALE else of_module
            tensors[f"{name}.{target.magnitude}"] = _plain(column)
    return tensors


def arrange_lycoris(modules: Mapping[str, Parts], layout: str) -> dict[str, Tensor]:
    """Return key -> tensor (fp32) in a layout, for parts of LoHa or LoKr with the scale in the first one.

    Raises AdapterError for a layout of the original modules, in which q, k and v are one.
    """
    target = forms()[layout]
    if target.original:
        raise AdapterError(
            "q, k and v are one module there, which LoHa and LoKr cannot express; write --to lycoris, which ComfyUI "
            "reads, or a LoRA with --rank R"
        )
    tensors: dict[str, Tensor] = {}
    for module, parts in modules.items():
        name = target.written(module)
        tensors |= {f"{name}.{part}": _plain(tensor) for part, tensor in parts.items()}
        if target.writes_alpha:
            tensors[f"{name}.alpha"] = torch.tensor(float(rank_of(parts) or 1))
    return tensors


def as_stored(module: str, pair: Pair) -> Pair:
    """Return the factors in the shapes that files and PEFT use, for a module named in either layout.

    They are matrices, except for the patch embedder, a convolution whose stride equals its kernel: a linear layer on
    patches. Its A [r, channels * 2 * 2] and B [out, r] become [r, channels, 2, 2] and [out, r, 1, 1].
    """
    down, up = pair
    if module not in _PATCH_EMBEDDERS:
        return pair
    return down.unflatten(1, (-1, _PATCH, _PATCH)), up[:, :, None, None]


def text_part(text: Mapping[str, str]) -> str:
    """Return `4 tensors for the text encoders (CLIP-L 2, CLIP-G 2; first: KEY)` for `Contents.text`."""
    counts = ", ".join(f"{encoder} {count}" for encoder, count in Counter(text.values()).items())
    return (
        f"{len(text)} tensor{'s' * (len(text) != 1)} for the text encoders ({counts}; first: {shown(next(iter(text)))})"
    )


def _as_matrices(module: str, parts: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a module's factors as matrices, also for a convolution over patches (see `as_stored`)."""
    if module not in _PATCH_EMBEDDERS:
        return parts
    kernels = {"A": (_PATCH, _PATCH), "B": (1, 1)}
    return {
        part: tensor.flatten(1) if tensor.shape[2:] == kernels.get(part) else tensor for part, tensor in parts.items()
    }


def _fault(parts: Mapping[str, Tensor]) -> str | None:
    if [parts[letter].ndim for letter in "AB" if letter in parts] != [2, 2] or len(parts["A"]) != parts["B"].shape[1]:
        return "lora_A and lora_B are not a pair of matrices of one rank"
    if not min(*parts["A"].shape, *parts["B"].shape):
        return "lora_A or lora_B is empty"
    return None


def _type_fault(parts: Mapping[str, Tensor]) -> str | None:
    odd = next((one for part, one in parts.items() if part != "alpha" and one.dtype not in READABLE), None)
    if odd is not None:
        return f"{str(odd.dtype).removeprefix('torch.')} is no type for the weights of a LoRA"
    if "alpha" in parts and not _is_number(parts["alpha"]):
        return "its alpha is not a finite number"
    return None


def _is_number(alpha: Tensor) -> bool:
    kind = alpha.dtype
    whole = not (kind.is_floating_point or kind.is_complex or kind is torch.bool)
    return alpha.numel() == 1 and (whole or kind in READABLE) and math.isfinite(alpha.item())


def _add(contents: Contents, layout: Layout, module: str, parts: Mapping[str, Tensor]) -> str | None:
    """Add a module to the contents under diffusers' names. Return its fault, or None."""
    down, up = (_widened(parts[letter]) for letter in "AB")
    scale = parts["alpha"].item() / len(down) if "alpha" in parts else None
    if module in _PATCH_EMBEDDERS and down.shape[1] % _PATCH**2:
        return f"{down.shape[1]} columns are no patches of {_PATCH}x{_PATCH}"
    if layout.original and module.endswith(".qkv") and len(up) % 3:
        return f"{len(up)} rows cannot be cut into q, k and v"
    pieces = _from_original(module, down, up) if layout.original else {module: (down, up)}
    twice = next((name for name in pieces if name in contents), None)
    if twice:
        return f"{twice} is in the file twice"
    contents.factors.update(pieces)
    if scale is not None:
        contents.alphas.update({name: scale * len(piece[0]) for name, piece in pieces.items()})
    return None


def _add_lycoris(contents: Contents, layout: Layout, module: str, parts: Mapping[str, Tensor]) -> str | None:
    """Add a module of LoHa or LoKr to the contents under diffusers' names. Return its fault, or None."""
    pieces = lycoris_pieces(module, parts, layout.original)
    if isinstance(pieces, str):
        return pieces
    twice = next((name for name in pieces if name in contents), None)
    if twice:
        return f"{twice} is in the file twice"
    contents.lycoris.update(pieces)
    return None


def _add_magnitude(contents: Contents, layout: Layout, module: str, parts: Mapping[str, Tensor]) -> str | None:
    """Add DoRA's magnitude of a module that was just added, under diffusers' names. Return its fault, or None."""
    if "magnitude" not in parts:
        return None
    if module in _PATCH_EMBEDDERS:
        return "DoRA of the patch embedder, a convolution, is not supported"
    names = diffusers_names(module) if layout.original else [module]
    present = [name for name in names if name in contents]
    pieces = magnitude_pieces(module, parts["magnitude"].float(), contents.size(present[0]), layout.original)
    if isinstance(pieces, str):
        return pieces
    contents.magnitudes.update({name: pieces[name] for name in present})
    return None


def _from_original(module: str, down: Tensor, up: Tensor) -> dict[str, Pair]:
    container, inside = cut(module, "joint_blocks")
    if inside not in FUSED:
        name = DIFFUSERS_OF[inside]
        return {f"{renamed(container)}{name}": (down, _swapped(inside, down, up))}
    names = [f"{renamed(container)}{name}" for name in FUSED[inside]]
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
        container, inside = cut(module, "transformer_blocks")
        place = container.replace("transformer_blocks", "joint_blocks")
        if container and inside in FUSED_OF:
            name, number = FUSED_OF[inside]
            fused.setdefault(f"{place}{name}", {})[number] = (down, up)
            modules.setdefault(f"{place}{name}", (down, up))  # keeps the module's position in the order
        elif inside in ORIGINAL_OF and bool(container) != stands_alone(inside):
            name = ORIGINAL_OF[inside]
            modules[f"{place}{name}"] = (down, _swapped(name, down, up))
        else:
            raise AdapterError(f"{module}: the original layout has no such linear layer, so neither kohya's nor "
                               "ComfyUI's files can hold it")  # fmt: skip
    return modules | {name: _joined(name, parts) for name, parts in fused.items()}


def _joined(name: str, parts: Mapping[int, Pair]) -> Pair:
    """Fuse q, k and v (0, 1, 2): block-diagonal unless they share their A. A missing part is zero."""
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
    """Remove padding: the ranks whose two factors are both zero."""
    kept = down.any(dim=1) | up.any(dim=0)
    return down[kept], up[:, kept]


def _swapped(original: str, down: Tensor, up: Tensor) -> Tensor:
    """Return B, with shift and scale exchanged if diffusers has them in the other order.

    That applies to the final layer, and to the last block's text stream, recognized by having only these two.
    """
    return torch.cat(up.chunk(2)[::-1]) if is_swapped(original, len(up), down.shape[1]) else up


def _widened(factor: Tensor) -> Tensor:
    """Return the factor in a dtype that supports computation: 8-bit floats do not."""
    return factor.float() if factor.element_size() == 1 else factor


def _plain(factor: Tensor) -> Tensor:
    return factor.detach().float().cpu().contiguous().clone()


def first_of(names: Iterable[str]) -> str:
    """Return the first name and the number of others: `a and 2 more`."""
    known = list(names)
    return shown(known[0]) + (f" and {len(known) - 1} more" if len(known) > 1 else "")


def shown(text: str) -> str:
    """Return text from a stranger's file, escaped and shortened to one line."""
    plain = text if text.isprintable() else ascii(text)
    return plain if len(plain) <= 200 else plain[:200] + "..."
