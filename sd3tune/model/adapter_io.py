"""The adapter file and its contract: what is written is what diffusers and ComfyUI load, and loading is counted.

Keys are diffusers' (`transformer.<module>.lora_A.weight`); the layouts of other tools are read, too (see
`adapter_layouts`). The scale alpha / r is folded into B and alpha = r is written, so that a loader that ignores alpha
computes the same. The file's metadata holds what PEFT needs to rebuild the layers (`lora_adapter_metadata`, as
diffusers writes it) and the conditioning contract (`sd3tune`), which `infer` applies: the base, T5 length, sigma
sampling, and so on; beside it stand the keys that other programs show (see `modelspec`). No time, host or path is in
it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sd3tune.atomic import new_file
from sd3tune.errors import AdapterError
from sd3tune.model.adapter_layouts import READABLE, Contents, Pair, first_of, interpret
from sd3tune.model.adapter_metadata import CONTRACT_KEY, PEFT_KEY, PREFIX, read_contract, read_peft
from sd3tune.model.contract import CONTRACT_VERSION
from sd3tune.model.modelspec import shown_metadata

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """A LoRA file as it lies on the disk, good or bad."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def bad(self) -> list[str]:
        """Keys of the tensors that are NaN or infinite somewhere."""
        readable = {key: value for key, value in self.tensors.items() if value.dtype in READABLE}
        return [key for key, value in readable.items() if not value.float().isfinite().all()]


@dataclass(frozen=True)
class Adapter:
    """A LoRA file in memory: factors per module, fp32 as stored, and the metadata."""

    path: Path
    factors: dict[str, Pair]
    """Module name -> (A [r, in], B [out, r])."""
    alphas: dict[str, float]
    """Module name -> alpha; the layer's output is scaled by alpha / r."""
    contract: dict[str, Any]
    """Empty when another tool wrote the file."""
    layout: str = "diffusers"
    """As the file had it; the names of the modules are diffusers' in any case."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """All that the file says, as text."""
    origin: str | None = None
    """Of one from the Hub: repository and commit, as `user/name:commit`."""
    base_in_card: str | None = None
    """Of one from the Hub: the base model that its card names."""

    @property
    def label(self) -> str:
        """What people call it."""
        return self.origin or str(self.path)

    def folded(self) -> dict[str, Pair]:
        """The factors in fp32 with the scale multiplied into B: their product is what is added to the weight."""
        return {
            module: (down.float(), up.float() * (self.alphas[module] / len(down)))
            for module, (down, up) in self.factors.items()
        }


@dataclass(frozen=True)
class Match:
    """How an adapter met a model: tensors that found their module, and the keys that did not."""

    matched: int
    unmatched: tuple[str, ...]


def fold_scale(factors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """`<module>.lora_A` and `.lora_B` tensors with the module's scale multiplied into every B."""
    return {
        name: tensor * scales[name.removesuffix(".lora_B")] if name.endswith(".lora_B") else tensor
        for name, tensor in factors.items()
    }


def write_adapter(folder: Path, factors: Mapping[str, Tensor], contract: Mapping[str, Any]) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` from folded `factors` (see `fold_scale`), in fp32.

    Raises AdapterError when a tensor is not finite, and nothing is written then.
    """
    tensors = {f"{PREFIX}{name}.weight": value.detach().float().cpu().contiguous() for name, value in factors.items()}
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise AdapterError(f"{folder}: not written: {len(bad)} tensors are NaN or infinite, first {bad[0]}")
    ranks = {name.removesuffix(".lora_A"): len(value) for name, value in factors.items() if name.endswith(".lora_A")}
    path = folder / ADAPTER_FILE
    shown = shown_metadata("diffusers", contract.get("name"), contract)
    save_tensors(path, tensors, {**shown, PEFT_KEY: peft_metadata(ranks), CONTRACT_KEY: contract_metadata(contract)})
    return path


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    with new_file(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", **metadata})


def contract_metadata(contract: Mapping[str, Any]) -> str:
    return json.dumps({"contract_version": CONTRACT_VERSION, **contract}, sort_keys=True)


def peft_metadata(ranks: Mapping[str, int]) -> str:
    """What PEFT needs to rebuild layers of these ranks, of which alpha is the rank."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Only the fields that every PEFT version knows: an unknown one stops another version from loading the file.
    peft: dict[str, Any] = {
        "r": rank, "lora_alpha": rank, "target_modules": list(ranks), "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    special = {f"^{module}": own for module, own in ranks.items() if own != rank}
    if special:
        peft |= {"rank_pattern": special, "alpha_pattern": special}
    return json.dumps({PREFIX + key: value for key, value in peft.items()}, sort_keys=True)


def find_adapter(location: str | Path) -> Path:
    """The adapter file of a file, an adapter folder, a checkpoint or a run folder. Raises AdapterError."""
    path = Path(location).expanduser()
    for candidate in (path, path / ADAPTER_FILE, path / "adapter" / ADAPTER_FILE):
        if candidate.is_file():
            return candidate
    if (path / "model" / "model_index.json").is_file():
        raise AdapterError(f"{path}: holds a whole model and no adapter; draw with --base {path / 'model'}")
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        if len(inside) == 1:
            return inside[0]
        raise AdapterError(
            f"{path}: no {ADAPTER_FILE} here or in its adapter/ folder"
            + (f"; name one of {', '.join(file.name for file in inside)}" if inside else "; has the run finished?")
        )
    raise AdapterError(f"{path}: no such file or folder")


def read_file(location: str | Path) -> AdapterFile:
    """The tensors and metadata of a safetensors file. Raises AdapterError."""
    path = find_adapter(location)
    if path.suffix != ".safetensors":
        raise AdapterError(f"{path}: adapters are read as safetensors only; pickled files can run any code")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file: {error}") from error
    return AdapterFile(path, metadata, tensors)


def read_adapter(location: str | Path) -> Adapter:
    """Read and check a LoRA file in any of the known layouts.

    Raises AdapterError for anything that is not a plain LoRA of SD3's transformer, whole and finite.
    """
    file = read_file(location)
    contents = interpret(file.tensors)
    _check(file, contents)
    return as_adapter(file, contents)


def as_adapter(file: AdapterFile, contents: Contents) -> Adapter:
    """The modules of `contents` that are whole. Raises AdapterError for metadata that nobody could apply."""
    alphas = _alphas(file.path, file.metadata, contents.factors) | contents.alphas
    contract = read_contract(file.path, file.metadata)
    return Adapter(file.path, contents.factors, alphas, contract, contents.layout, file.metadata)


def match(transformer: nn.Module, adapter: Adapter) -> Match:
    """Which of the adapter's tensors have a module of their shape in `transformer`, before anything is loaded.

    Raises AdapterError when a shape disagrees or nothing matches: such a file would load with no effect.
    """
    linear = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    linear = {name.removesuffix(".base_layer"): module for name, module in linear.items()}
    unmatched = tuple(name for name in adapter.factors if name not in linear)
    for name, (down, up) in adapter.factors.items():
        module = linear.get(name)
        if module is not None and (up.shape[0], down.shape[1]) != (module.out_features, module.in_features):
            raise AdapterError(
                f"{adapter.path}: made for another base: {name} is {up.shape[0]}x{down.shape[1]} in the adapter and "
                f"{module.out_features}x{module.in_features} in the model; give the right one with --base"
            )
    if len(unmatched) == len(adapter.factors):
        raise AdapterError(
            f"{adapter.path}: none of its {len(unmatched)} modules exists in this model, so it would have no effect "
            f"(first: {unmatched[0]})"
        )
    return Match(2 * (len(adapter.factors) - len(unmatched)), unmatched)


def attach(transformer: Any, adapter: Adapter, name: str) -> Match:
    """Load `adapter` into `transformer` under `name`, in the model's dtype, and count what was matched.

    `transformer` is an SD3Transformer2DModel; its active adapters are set by the caller (`set_adapters`).
    """
    counted = match(transformer, adapter)
    kept = {module: pair for module, pair in adapter.factors.items() if module not in counted.unmatched}
    tensors = {
        f"{PREFIX}{module}.lora_{letter}.weight": tensor.to(transformer.dtype)
        for module, pair in kept.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }
    first = next(iter(kept))
    ranks, alphas = (
        {module: kept[module][0].shape[0] for module in kept},
        {module: adapter.alphas[module] for module in kept},
    )
    config = {
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "target_modules": list(kept),
        "rank_pattern": {f"^{module}": rank for module, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {f"^{module}": alpha for module, alpha in alphas.items() if alpha != alphas[first]},
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is meant
        transformer.load_lora_adapter(
            tensors, adapter_name=name, metadata={PREFIX + key: value for key, value in config.items()}
        )
    carried = sum(name in getattr(module, "lora_A", {}) for module in transformer.modules())
    if carried != len(kept):
        raise AdapterError(f"{adapter.path}: {carried} of {len(kept)} modules took their weights")
    return counted


def _check(file: AdapterFile, contents: Contents) -> None:
    if not file.tensors:
        raise AdapterError(f"{file.path}: not a LoRA: it holds no tensors")
    if contents.unknown:
        what = next(iter(contents.unknown.values()))
        raise AdapterError(
            f"{file.path}: not a LoRA of SD3's transformer alone: {first_of(contents.unknown)} "
            + (f"is {what}" if what else "belongs to no module of it in any layout that is known")
        )
    if contents.broken:
        module, fault = next(iter(contents.broken.items()))
        raise AdapterError(f"{file.path}: {module}: {fault}")
    if file.bad:
        raise AdapterError(f"{file.path}: {len(file.bad)} tensors are NaN or infinite, first {file.bad[0]}")


def _alphas(path: Path, metadata: Mapping[str, str], factors: Mapping[str, Pair]) -> dict[str, float]:
    """Per module: the metadata's alpha (and alpha_pattern); a file without any means alpha = rank.

    An rsLoRA file scales by alpha / sqrt(r), so what counts as alpha here is sqrt(r) times as much.
    """
    peft = read_peft(path, metadata)
    if peft.get("use_dora"):
        raise AdapterError(f"{path}: DoRA files are not supported yet")
    rslora = bool(peft.get("use_rslora"))
    common, patterns = peft.get("lora_alpha"), peft.get("alpha_pattern") or {}

    def alpha(module: str, rank: int) -> float:
        special = [value for ending, value in patterns.items() if re.fullmatch(rf"(.*\.)?({ending})", module)]
        return float([*special, rank if common is None else common][0]) * (rank**0.5 if rslora else 1)

    return {module: alpha(module, down.shape[0]) for module, (down, _) in factors.items()}
