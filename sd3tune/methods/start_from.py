"""`method.start_from`: training that starts from an existing adapter, with the same output at the first step."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sd3tune.adapter.dora import per_output
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.layouts import PATCH_EMBEDDER
from sd3tune.errors import AdapterError
from sd3tune.model.lora.layers import Layer
from sd3tune.model.lora.targets import untrainable_modules


def check_start(
    adapter: Adapter,
    transformer: nn.Module,
    layers: Mapping[str, Layer],
    section: str = "method",
    *,
    dora: bool = False,
) -> None:
    """Raise AdapterError if the adapter's kind, modules, sizes or ranks do not match `layers`, which `section`
    configures.

    `transformer` may also be a text encoder. Modules that the adapter lacks are newly initialized. Modules whose output
    is unused are ignored. With `dora`, it may also be a DoRA whose magnitudes PEFT can train.
    """
    _check_kind(adapter, dora)
    if PATCH_EMBEDDER in adapter.factors:
        raise AdapterError(
            f"method.start_from: {adapter.path} also adapts {PATCH_EMBEDDER}, which sd3tune does not train; "
            f"{_merging(adapter)}"
        )
    linear = {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    foreign = [name for name in adapter.factors if name not in linear]
    if foreign:
        raise AdapterError(
            f"method.start_from: {adapter.path} was made for another base: it adapts {_first(foreign)}, which this one "
            "lacks"
        )
    ignored = untrainable_modules(transformer)
    left_out = [name for name in adapter.factors if name not in layers and name not in ignored]
    if left_out:
        leaves_out = "method.targets and method.blocks leave" if section == "method" else f"{section}.targets leaves"
        raise AdapterError(
            f"method.start_from: {adapter.path} also adapts {_first(left_out)}, which {leaves_out} out; without it the "
            "run would start from a different function"
        )
    shared = {name: (pair, layers[name]) for name, pair in adapter.factors.items() if name in layers}
    if not shared:
        raise AdapterError(f"method.start_from: {adapter.path} adapts none of the trained modules")
    for name, ((down, up), _) in shared.items():
        module = transformer.get_submodule(name)
        assert isinstance(module, nn.Linear)
        if (up.shape[0], down.shape[1]) != (module.out_features, module.in_features):
            raise AdapterError(
                f"method.start_from: {adapter.path} was made for another base: {name} is {up.shape[0]}x{down.shape[1]} "
                f"there and {module.out_features}x{module.in_features} in this one"
            )
    for rank in dict.fromkeys(down.shape[0] for (down, _), _ in shared.values()):
        odd = [name for name, ((down, _), layer) in shared.items() if down.shape[0] == rank != layer.rank]
        if odd:
            raise AdapterError(
                f"method.start_from: {adapter.path} has rank {rank} where this run has {layers[odd[0]].rank}: "
                f"{_first(odd)}; set {section}.rank to {rank}"
                + ", or method.rank_pattern for single modules"
                * (section == "method")
            )


def _check_kind(adapter: Adapter, dora: bool) -> None:
    """Raise AdapterError for LoHa and LoKr, and for a DoRA that PEFT's layers cannot train."""
    trainable = dora and not adapter.of_base and all(per_output(one) for one in adapter.magnitudes.values())
    if adapter.kind != "LoRA" and not (adapter.kind == "DoRA" and trainable):
        raise AdapterError(
            f"method.start_from: {adapter.path} is a {adapter.kind}, which this run cannot continue; "
            f"{_merging(adapter)}" + "; or set method.kind=dora" * (adapter.kind == "DoRA" and not dora)
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
