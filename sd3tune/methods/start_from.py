"""`method.start_from`: training that starts from an existing adapter, with the same output at the first step."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from sd3tune.adapter.dora import per_output
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.layouts import PATCH_EMBEDDER
from sd3tune.errors import AdapterError
from sd3tune.model.lora.layers import Layer
from sd3tune.model.lora.targets import untrainable_modules

KINDS = ("lora", "dora", "loha", "lokr")
"""Kinds of adapters that a run can continue."""


def check_start(
    adapter: Adapter,
    transformer: nn.Module,
    layers: Mapping[str, Layer],
    section: str = "method",
    *,
    kind: str = "lora",
) -> None:
    """Raise AdapterError if the adapter's kind, modules, sizes or ranks do not match `layers`, which `section`
    configures.

    `transformer` may also be a text encoder. Modules that the adapter lacks are newly initialized. Modules whose output
    is unused are ignored. With `kind` dora, it may also be a DoRA whose magnitudes PEFT can train.
    """
    _check_kind(adapter, kind)
    ranks = {name: len(adapter.factors[name][0]) for name in _shared(adapter, transformer, layers, section)}
    for rank in dict.fromkeys(ranks.values()):
        odd = [name for name, its in ranks.items() if its == rank != layers[name].rank]
        if odd:
            raise AdapterError(
                f"method.start_from: {adapter.path} has rank {rank} where this run has {layers[odd[0]].rank}: "
                f"{_first(odd)}; set {section}.rank to {rank}"
                + ", or method.rank_pattern for single modules"
                * (section == "method")
            )


def check_lycoris_start(
    adapter: Adapter, transformer: nn.Module, shapes: Mapping[str, Mapping[str, tuple[int, int]]], kind: str
) -> None:
    """Do as `check_start` for LoHa and LoKr, whose parts have these `shapes` in each module."""
    _check_kind(adapter, kind)
    for name in _shared(adapter, transformer, shapes, "method"):
        found = {part: tuple(tensor.shape) for part, tensor in adapter.lycoris[name].items()}
        if found != dict(shapes[name]):
            keys = {"loha": "method.rank", "lokr": "method.rank, method.factor and method.decompose_both"}[kind]
            theirs, ours = (
                ", ".join(f"{part} {rows}x{columns}" for part, (rows, columns) in of.items())
                for of in (found, shapes[name])
            )
            raise AdapterError(
                f"method.start_from: {adapter.path} has other matrices than this run: {name} has {theirs} there and "
                f"{ours} in this one; set {keys} as the file's training did"
            )


def _shared(adapter: Adapter, transformer: nn.Module, trained: Collection[str], section: str) -> list[str]:
    """Return the trained modules that the adapter has. Raises AdapterError for other modules and sizes."""
    if PATCH_EMBEDDER in adapter.factors:
        raise AdapterError(
            f"method.start_from: {adapter.path} also adapts {PATCH_EMBEDDER}, which sd3tune does not train; "
            f"{_merging(adapter)}"
        )
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    foreign = [name for name in adapter.sizes if name not in linear]
    if foreign:
        raise AdapterError(
            f"method.start_from: {adapter.path} was made for another base: it adapts {_first(foreign)}, which this one "
            "lacks"
        )
    ignored = untrainable_modules(transformer)
    left_out = [name for name in adapter.sizes if name not in trained and name not in ignored]
    if left_out:
        leaves_out = "method.targets and method.blocks leave" if section == "method" else f"{section}.targets leaves"
        raise AdapterError(
            f"method.start_from: {adapter.path} also adapts {_first(left_out)}, which {leaves_out} out; without it the "
            "run would start from a different function"
        )
    shared = [name for name in adapter.sizes if name in trained]
    if not shared:
        raise AdapterError(f"method.start_from: {adapter.path} adapts none of the trained modules")
    for name in shared:
        module, (outputs, inputs) = transformer.get_submodule(name), adapter.sizes[name]
        assert isinstance(module, nn.Linear)
        if (outputs, inputs) != (module.out_features, module.in_features):
            raise AdapterError(
                f"method.start_from: {adapter.path} was made for another base: {name} is {outputs}x{inputs} "
                f"there and {module.out_features}x{module.in_features} in this one"
            )
    return shared


def _check_kind(adapter: Adapter, kind: str) -> None:
    """Raise AdapterError for an adapter of another kind than the run's, and for a DoRA that PEFT cannot train."""
    plain_dora = not adapter.of_base and all(per_output(one) for one in adapter.magnitudes.values())
    own = adapter.kind.lower()
    if (own == kind and (own != "dora" or plain_dora)) or (own, kind) == ("lora", "dora"):
        return
    raise AdapterError(
        f"method.start_from: {adapter.path} is a {adapter.kind}, which this run cannot continue; "
        f"{_merging(adapter)}" + f"; or set method.kind={own}" * (own in KINDS and own != kind)
    )


def transformer_alone(adapter: Adapter) -> str:
    """Return the way out of leaving the text encoders of a file out."""
    path = shlex.quote(str(adapter.path))
    command = f"sd3tune lora convert {path} --transformer-only --to diffusers --out NEW.safetensors"
    return f"`{command}` writes a file without text encoders"


def _merging(adapter: Adapter) -> str:
    """Return the way out of merging."""
    command = f"sd3tune lora merge {shlex.quote(str(adapter.path))} --into-base --out FOLDER"
    return f"merge it into its base (`{command}`) and train on the result"


def starting_factors(adapter: Adapter, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """Return `<module>.lora_A` and `.lora_B`, fp32: with the run's scale, scale B A equals the file's update."""
    factors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if name in adapter.factors:
            down, up = (factor.float() for factor in adapter.factors[name])
            factors[f"{name}.lora_A"] = down
            factors[f"{name}.lora_B"] = up * (adapter.alphas[name] / layer.rank / layer.scale)
    return factors


def _first(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
