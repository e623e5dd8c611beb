"""Names that tools give the text encoders' modules in a LoRA file.

In memory, names are diffusers' with the encoder's folder first, `text_encoder.text_model.encoder.layers.0.mlp.fc1`;
T5's are `text_encoder_3.encoder.block.0.layer.0.SelfAttention.q`. No layout fuses modules of a text encoder.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from sd3tune.adapter.layouts import split_key
from sd3tune.errors import AdapterError
from sd3tune.model.base.parts import ENCODER_OF, ENCODER_PARTS, LABELS

Value = TypeVar("Value")

_CLIP = (*(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
_T5 = (
    *(f"layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
_BLOCKS = {"clip_l": "text_model.encoder.layers", "clip_g": "text_model.encoder.layers", "t5": "encoder.block"}
_INSIDE = {"clip_l": _CLIP, "clip_g": _CLIP, "t5": _T5}
_SHORT = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}

PREFIXES = {
    "diffusers": {name: f"{part}." for name, (_, part) in ENCODER_PARTS.items()},
    "kohya": {name: f"lora_te{number}_" for number, name in enumerate(ENCODER_PARTS, 1)},
    "comfyui": {name: f"text_encoders.{_SHORT[name]}.transformer." for name in ENCODER_PARTS},
}
"""Form -> encoder -> prefix of its modules' names. kohya's names are flat: dots are written as underscores."""
_READ_TOO = {"clip_l": ("clip_l.",), "clip_g": ("clip_g.",), "t5": ("t5.",)}


def locate_text(key: str) -> tuple[str, str] | None:
    """Return module and part (`A`, `B` or `alpha`) of a text encoder's key; None for other keys."""
    written, half = split_key(key) or ("", "")
    for name, (_, part) in ENCODER_PARTS.items():
        for prefix in (*(of[name] for of in PREFIXES.values()), *_READ_TOO[name]):
            module = _module(name, written.removeprefix(prefix)) if written.startswith(prefix) else None
            if module is not None:
                return f"{part}.{module}", half
    return None


def written_text(module: str, form: str) -> str:
    """Return a module's name in a form of `layouts.forms`. Raises AdapterError if the form has no place for it."""
    part, _, inside = module.partition(".")
    name = ENCODER_OF[part]
    if form not in PREFIXES:
        raise AdapterError(f"{module}: this layout has no names for text encoders; leave them out: --transformer-only")
    if form == "diffusers" and name == "t5":
        raise AdapterError(
            f"{module}: diffusers loads no LoRA of T5; write kohya's or ComfyUI's layout, or leave the text encoders "
            "out: --transformer-only"
        )
    return PREFIXES[form][name] + (inside.replace(".", "_") if form == "kohya" else inside)


def is_text(module: str) -> bool:
    """Return True for a module of a text encoder, False for one of the transformer."""
    return module.partition(".")[0] in ENCODER_OF


def of_part(values: Mapping[str, Value], part: str) -> dict[str, Value]:
    """Return the entries of one text encoder, such as `text_encoder_2`, by their names in it."""
    prefix = f"{part}."
    return {module.removeprefix(prefix): value for module, value in values.items() if module.startswith(prefix)}


def text_parts(modules: Iterable[str]) -> list[str]:
    """Return the text encoders of `modules`, in order, each once."""
    return list(dict.fromkeys(module.partition(".")[0] for module in modules if is_text(module)))


def by_encoder(modules: Iterable[str]) -> str:
    """Return the modules of each text encoder in words: `CLIP-L 48, CLIP-G 128`."""
    counts = Counter(ENCODER_OF[module.partition(".")[0]] for module in modules if is_text(module))
    return ", ".join(f"{LABELS[name]} {count}" for name, count in counts.items())


def _module(name: str, written: str) -> str | None:
    """Return the dotted name of a known module of an encoder; None for other names."""
    plain = written if written.startswith("text_model") or name == "t5" else f"text_model.{written}"
    found = _pattern(name).fullmatch(plain.replace(".", "_"))
    return f"{_BLOCKS[name]}.{found[1]}.{_by_flat_name(name)[found[2]]}" if found else None


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"{_BLOCKS[name].replace('.', '_')}_(\d{{1,3}})_({'|'.join(_by_flat_name(name))})")


@functools.cache
def _by_flat_name(name: str) -> dict[str, str]:
    return {inside.replace(".", "_"): inside for inside in _INSIDE[name]}
