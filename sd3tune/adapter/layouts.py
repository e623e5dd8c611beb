"""Names that tools give SD3's modules in a LoRA file, and the purpose of other keys in such files."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

IN_BLOCK = {
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
"""Name inside a block in the original layout -> diffusers' name, for modules that neither layout fuses."""
FUSED = {
    "x_block.attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "x_block.attn2.qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "context_block.attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
"""The original layout's fused modules -> diffusers' names of q, k and v."""
PATCH_EMBEDDER = "pos_embed.proj"
"""diffusers' name of the convolution that turns patches of latents into tokens."""
OUTSIDE = {
    "context_embedder": "context_embedder",
    "x_embedder.proj": PATCH_EMBEDDER,
    "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
    "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
    "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
"""The same as `IN_BLOCK` for the modules outside the blocks."""
# OneTrainer writes q, k and v separately under the original names, as qkv.0, qkv.1 and qkv.2.
PARTS_OF_FUSED = {f"{fused}.{number}": part for fused, parts in FUSED.items() for number, part in enumerate(parts)}
_ORIGINAL_NAMES = (*IN_BLOCK, *FUSED, *PARTS_OF_FUSED, *OUTSIDE)
_DIFFUSERS_NAMES = (*IN_BLOCK.values(), *(part for parts in FUSED.values() for part in parts), *OUTSIDE.values())

MAGNITUDE, DORA_SCALE = "lora_magnitude_vector", "dora_scale"
"""PEFT's name of DoRA's magnitude, and other tools'."""


@dataclass(frozen=True)
class Layout:
    """The format of a tool's LoRA files."""

    name: str
    prefix: str
    """Prefix of a module's name."""
    original: bool = False
    """True for modules of the original layout, not diffusers'."""
    flat: bool = False
    """True if dots are written as underscores."""
    any_module: bool = False
    """True if names that SD3 lacks are accepted too; matching with a model counts them later."""
    form: str | None = None
    """Its name for `sd3tune lora convert --to`; None for a layout that is only read."""
    halves: tuple[str, str] = ("lora_A", "lora_B")
    """The names of A and B."""
    magnitude: str = DORA_SCALE
    """The name of DoRA's magnitude."""
    writes_alpha: bool = False
    """True if a written file has a tensor of alpha, equal to the rank, for each module."""
    has_peft_metadata: bool = False
    """True if a written file's metadata contains PEFT's configuration."""
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    """Additional metadata of a written file; `{rank}` stands for the most common rank."""
    implementation: str = "diffusers"
    """`modelspec.implementation` of a written file: the origin of the module names, also `diffusers` in sd-scripts."""

    def written(self, module: str) -> str:
        """Return a module's name in a file of this layout."""
        return self.prefix + (module.replace(".", "_") if self.flat else module)


_COMFYUI = "https://github.com/comfyanonymous/ComfyUI"
_SD_SCRIPTS = {"ss_network_module": "networks.lora_sd3", "ss_network_dim": "{rank}", "ss_network_alpha": "{rank}"}
LAYOUTS = [
    Layout("PEFT", "transformer.base_model.model.", any_module=True),  # SimpleTuner's first files
    Layout("OneTrainer", "transformer.", original=True),
    Layout("diffusers", "transformer.", any_module=True, form="diffusers", magnitude=MAGNITUDE, has_peft_metadata=True),
    Layout("PEFT", "base_model.model.", any_module=True),
    Layout(
        "kohya",
        "lora_unet_",
        original=True,
        flat=True,
        form="kohya",
        halves=("lora_down", "lora_up"),
        writes_alpha=True,
        metadata=_SD_SCRIPTS,
    ),
    Layout("ComfyUI", "diffusion_model.", original=True, form="comfyui", implementation=_COMFYUI),
    Layout("OneTrainer", "lora_transformer_", flat=True),
    Layout("LyCORIS", "lycoris_", flat=True, form="lycoris", halves=("lora_down", "lora_up"), writes_alpha=True),
    Layout("diffusers", ""),  # `transformer.save_lora_adapter()`
    Layout("OneTrainer", "", original=True),
]
"""The layouts that are read: ComfyUI's list for SD3, and names without prefix. The first that fits a key applies."""

_PART = r"(?:hada|lokr)_(?:w[12](?:_[ab])?|t[12])"  # of LoHa and LoKr
_KEY = re.compile(
    rf"(.+?)(?:\.(alpha|{_PART})|[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.[^.]+)?\.weight"
    rf"|\.(dora_scale|{MAGNITUDE}(?:\.[^.]+){{0,2}}))",
    re.DOTALL,
)
_HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_TEXT = (
    (r"lora_te1_|text_encoder\.|text_encoders\.clip_l\.|clip_l\.", "CLIP-L"),
    (r"lora_te2_|text_encoder_2\.|text_encoders\.clip_g\.|clip_g\.", "CLIP-G"),
    (r"lora_te3_|text_encoder_3\.|text_encoders\.t5xxl\.|t5\.", "T5"),
    (r"bundle_emb\.", "OneTrainer's embeddings"),
    (r"lora_te\d?_|text_encoder|lora_prior_te", "a text encoder"),
)
_FOREIGN = (  # (pattern of a key without known layout, its meaning); the first match applies
    (r"dora_scale|lora_magnitude_vector", "DoRA of a module that SD3 lacks"),
    (r"\.(hada|lokr)_|\.lora_mid|\.(a1|b1)\.weight", "a kind of adapter, or a module, that sd3tune does not read"),
    (r"\.(diff|diff_b|w_norm|b_norm)$", "differences of whole weights, which is no LoRA"),
    (r"double_blocks|single_blocks|single_transformer_blocks", "for another architecture (Flux or the like)"),
    (r"down_blocks|up_blocks|mid_block|(in|out)put_blocks|middle_block", "for a Stable Diffusion 1, 2 or XL model"),
)


def register_layout(layout: Layout) -> None:
    """Add a layout. It is read before all others and, with a `form`, can be written.

    Raises ValueError for a form that is already registered, and for a layout whose keys would be read as another.
    """
    if layout.form is not None and layout.form in forms():
        raise ValueError(f"{layout.name}: there is a form {layout.form!r} already; choose another")
    LAYOUTS.insert(0, layout)
    module = "joint_blocks.0.x_block.mlp.fc1" if layout.original else "transformer_blocks.0.ff.net.2"
    key = f"{layout.written(module)}.{layout.halves[1]}.weight"
    if locate(key) != (layout, module, "B"):
        LAYOUTS.remove(layout)
        raise ValueError(f"{layout.name}: its key {key} is not read as one of it; B is lora_B or lora_up in every file")


def unregister_layout(layout: Layout) -> None:
    """Remove a registered layout. Raises ValueError for a layout that is not registered."""
    LAYOUTS.remove(layout)


def forms() -> dict[str, Layout]:
    """Return form -> layout, for the layouts that can be written."""
    return {layout.form: layout for layout in LAYOUTS if layout.form is not None}


def locate(key: str) -> tuple[Layout, str, str] | None:
    """Return layout, module (dotted, in the layout's names) and part of a key; None for others.

    The part is `A`, `B`, `alpha`, `magnitude` (DoRA's), or one of LoHa or LoKr, such as `hada_w1_a`.
    Between `lora_A` and `weight` PEFT writes the adapter's name, such as `default_0`, which is ignored.
    """
    name, part = split_key(key) or ("", "")
    for layout in LAYOUTS if part else ():
        if name.startswith(layout.prefix):
            inside = name.removeprefix(layout.prefix)
            module = inside if layout.any_module else _known_name(inside, layout)
            if module:
                return layout, module, part
    return None


def split_key(key: str) -> tuple[str, str] | None:
    """Return the name of a module, as written, and the part (see `locate`); None for other keys."""
    found = _KEY.fullmatch(key)
    return (found[1], "magnitude" if found[4] else found[2] or _HALVES[found[3]]) if found else None


def text_encoder_of(key: str) -> str | None:
    """Return the text encoder of a key, or `OneTrainer's embeddings`, which the encoders read; None for other keys."""
    return next((what for pattern, what in _TEXT if re.match(pattern, key)), None)


def foreign(key: str) -> str:
    """Return the probable purpose of a key that belongs to no module; empty if unknown."""
    return next((what for pattern, what in _FOREIGN if re.search(pattern, key)), "")


def stands_alone(dotted: str) -> bool:
    """Return True if a module of that name, in either layout, is outside the blocks."""
    return dotted in OUTSIDE or dotted in OUTSIDE.values()


def _known_name(name: str, layout: Layout) -> str | None:
    """Return the dotted name of a known module from its name in a file; None for other names."""
    container, names = (
        ("joint_blocks", _ORIGINAL_NAMES) if layout.original else ("transformer_blocks", _DIFFUSERS_NAMES)
    )
    write: Callable[[str], str] = (lambda text: text.replace(".", "_")) if layout.flat else str
    in_block = re.fullmatch(rf"{container}[._](\d{{1,3}})[._](.+)", name)
    inside = in_block[2] if in_block else name
    dotted = next((known for known in names if write(known) == inside), None)
    if dotted is None or (in_block is None) != stands_alone(dotted):
        return None
    return f"{container}.{in_block[1]}.{dotted}" if in_block else dotted
