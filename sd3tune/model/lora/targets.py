"""Target modules of LoRA: names, presets and expressions over the transformer's linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from sd3tune.errors import AdapterError

Value = TypeVar("Value")

ATTENTION_IMAGE = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
    *("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
)
"""The image stream's projections, with SD3.5-medium's second attention, which has image tokens only.

The ending `attn.to_q` does not match `attn2.to_q`, so the latter are listed.
"""
ATTENTION_CONTEXT = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
MLP = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")
ELSEWHERE = "elsewhere"
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (*ATTENTION_IMAGE, *ATTENTION_CONTEXT),
    "attention-image": ATTENTION_IMAGE,
    "attention+mlp": (*ATTENTION_IMAGE, *ATTENTION_CONTEXT, *MLP),
}


@dataclass(frozen=True)
class CoverageRow:
    """One kind of module: the number of blocks where it is trained and present, and its trainable parameters."""

    module: str
    trained: int
    present: int
    parameters: int
    in_blocks: bool = True


def fits(name: str, pattern: str) -> bool:
    """Return True if a module's full name equals `pattern`, ends with it, or fully matches `re:...`."""
    if pattern.startswith("re:"):
        return re.fullmatch(pattern.removeprefix("re:"), name) is not None
    return name == pattern or name.endswith(f".{pattern}")


def select_modules(
    transformer: nn.Module, targets: str | Sequence[str], blocks: Sequence[int | str] | None = None
) -> list[str]:
    """Return the full names of the linear modules to train, in the model's order.

    `targets` is a preset, a `re:...` expression, or a list of such expressions, names or endings; `blocks` are numbers
    or ranges like "0-11", None for all of the model. Modules that can never learn are left out.
    Raises AdapterError when an entry matches nothing, or nothing that can learn, or a block does not exist.
    """
    linear = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    never = untrainable_modules(transformer)
    inside = inside_blocks(transformer, blocks)
    patterns = PRESETS.get(targets, (targets,)) if isinstance(targets, str) else targets
    problems = []
    for pattern in () if patterns in PRESETS.values() else patterns:
        matches = [name for name in linear if fits(name, pattern)]
        if not matches:
            problems.append(
                f"method.targets: {pattern!r} matches no linear module of the transformer; {_kinds(linear)}"
            )
        elif not any(inside(name) for name in matches):
            problems.append(f"method.targets: {pattern!r} matches nothing in method.blocks, only {matches[0]} and such")
        elif all(name in never for name in matches if inside(name)):
            problems.append(f"method.targets: {pattern!r} matches only {matches[-1]}, whose output nothing reads")
    if problems:
        raise AdapterError(*problems)
    return [
        name
        for name in linear
        if name not in never and inside(name) and any(fits(name, pattern) for pattern in patterns)
    ]


def untrainable_modules(transformer: nn.Module) -> set[str]:
    """Return the linear modules whose gradient is always zero: the context query of the last block.

    That block discards its context stream, and has no `to_add_out` and `ff_context`. All other linear layers learn.
    """
    return {
        f"{name}.attn.add_q_proj"
        for name, block in transformer.named_modules()
        if getattr(block, "context_pre_only", None) is True and hasattr(block, "attn")
    }


def values_by_pattern(
    modules: Sequence[str], patterns: Mapping[str, Value], default: Value, key: str
) -> dict[str, Value]:
    """Return module -> the value of its first matching pattern, else `default`.

    Raises AdapterError for a pattern that matches no module.
    """
    idle = [pattern for pattern in patterns if not any(fits(name, pattern) for name in modules)]
    if idle:
        raise AdapterError(*(f"{key}: {pattern!r} matches none of the trained modules" for pattern in idle))
    return {
        name: next((value for pattern, value in patterns.items() if fits(name, pattern)), default) for name in modules
    }


def lora_parameters(rank: int, inputs: int, outputs: int) -> int:
    """Return the number of parameters of LoRA on a linear layer of these sizes."""
    return rank * (inputs + outputs)


def coverage(
    transformer: nn.Module,
    ranks: Mapping[str, int],
    parameters: Callable[[int, int, int], int] = lora_parameters,
) -> list[CoverageRow]:
    """Group the modules of `ranks` by their place in a block, for the table at the start of a run.

    `parameters(rank, inputs, outputs)` counts the trained parameters of a layer.
    """
    rows: dict[str, CoverageRow] = {}
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        kind = _kind(name)
        row = rows.get(kind, CoverageRow(kind, 0, 0, 0))
        trained = parameters(ranks[name], module.in_features, module.out_features) if name in ranks else 0
        rows[kind] = CoverageRow(
            kind, row.trained + (name in ranks), row.present + 1, row.parameters + trained, in_blocks=kind != name
        )
    return [row for row in rows.values() if row.trained]


class _Inside:
    """Predicate: True for a module or parameter in one of the selected blocks."""

    def __init__(self, numbers: set[int] | None) -> None:
        self.numbers = numbers

    def __call__(self, name: str) -> bool:
        found = re.match(r"transformer_blocks\.(\d+)\.", name)
        return self.numbers is None or (found is not None and int(found[1]) in self.numbers)


def inside_blocks(transformer: nn.Module, blocks: Sequence[int | str] | None) -> Callable[[str], bool]:
    """Return the test if a module or parameter lies in one of `blocks`, numbers or ranges like "0-11"; None: anywhere.

    Raises AdapterError for a block that does not exist.
    """
    if blocks is None:
        return _Inside(None)
    count = len(transformer.transformer_blocks)  # type: ignore[arg-type]
    numbers: set[int] = set()
    for entry in blocks:
        first, _, last = str(entry).partition("-")
        if int(last or first) >= count:
            raise AdapterError(
                f"method.blocks: {last or first} is out of range; this base has {count} blocks, 0 to {count - 1}"
            )
        numbers |= set(range(int(first), int(last or first) + 1))
    return _Inside(numbers)


def block_of(name: str) -> str:
    """Return the readable name of a module's or parameter's block, `block 3`; ELSEWHERE outside of blocks."""
    found = re.match(r"transformer_blocks\.(\d+)\.", name)
    return f"block {found[1]}" if found else ELSEWHERE


def _kind(name: str) -> str:
    return re.sub(r"^transformer_blocks\.\d+\.", "", name)


def _kinds(linear: Sequence[str]) -> str:
    return "its modules are " + ", ".join(dict.fromkeys(_kind(name) for name in linear))
