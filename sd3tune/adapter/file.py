"""The adapter file, which diffusers and ComfyUI load unchanged, and its conditioning contract.

Keys are diffusers' (`transformer.<module>.lora_A.weight`). Other tools' layouts are read too (see `layouts`, and
`peft_config` for PEFT's folders). The scale alpha / r is folded into B and alpha = r is written, so a loader that
ignores alpha computes the same. The metadata holds PEFT's configuration (`lora_adapter_metadata`, as diffusers writes
it), the contract (`sd3tune`), which `infer` applies, and the keys that other programs show (see `modelspec`). It
contains no time, host or path.
"""

from __future__ import annotations

import json
import math
import shlex
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sd3tune.adapter.metadata import CONTRACT_KEY, PEFT_KEY, PREFIX, read_contract
from sd3tune.adapter.modelspec import shown_metadata
from sd3tune.adapter.peft_config import CONFIG_FILE, WEIGHTS_FILE, peft_arguments, peft_metadata, read_peft
from sd3tune.adapter.rearrange import READABLE, Contents, Pair, as_stored, first_of, interpret, text_part
from sd3tune.adapter.text_layouts import is_text, of_part, text_parts
from sd3tune.errors import AdapterError
from sd3tune.files.atomic import new_file
from sd3tune.files.tensor_header import BadHeader, read_header
from sd3tune.files.tensors import save_sorted
from sd3tune.model.base.contract import CONTRACT_VERSION, WAY_OUT

ADAPTER_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class AdapterFile:
    """The raw metadata and tensors of a LoRA file, not yet checked."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    @property
    def bad(self) -> list[str]:
        """Keys of the tensors that contain NaN or infinity."""
        readable = {key: value for key, value in self.tensors.items() if value.dtype in READABLE}
        return [key for key, value in readable.items() if not value.float().isfinite().all()]


@dataclass(frozen=True)
class Adapter:
    """A LoRA file in memory: factors per module, fp32 as stored, and the metadata."""

    path: Path
    factors: dict[str, Pair]
    """Module name of the transformer -> (A [r, in], B [out, r])."""
    alphas: dict[str, float]
    """Module name -> alpha; the layer's output is scaled by alpha / r. Text encoders' modules are included."""
    contract: dict[str, Any]
    """The conditioning contract; empty if another tool wrote the file."""
    layout: str = "diffusers"
    """The layout of the file; module names here are always diffusers'."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """The file's metadata, as text."""
    origin: str | None = None
    """Repository and commit of an adapter from the Hub, as `user/name:commit`."""
    base_in_card: str | None = None
    """The base model in the card of an adapter from the Hub."""
    rslora: bool = False
    """True if the file scales by alpha / sqrt(r); `alphas` are converted, to sqrt(r) times the file's."""
    notes: tuple[str, ...] = ()
    """Notes for the user: an assumed alpha, ignored tensors."""
    for_diffusers: bool = True
    """True if diffusers' pipeline loads the file itself."""
    text_factors: Mapping[str, Pair] = field(default_factory=dict)
    """The same as `factors` for the text encoders; names begin with their folder (see `text_layouts`)."""

    @property
    def label(self) -> str:
        """The adapter's name in messages."""
        return self.origin or str(self.path)

    def folded(self) -> dict[str, Pair]:
        """Return the factors in fp32 with the scale folded into B, so that BA is added to the weight."""
        return self._folded(self.factors)

    def whole(self) -> dict[str, Pair]:
        """Return `folded`, with the text encoders' modules."""
        return self._folded({**self.factors, **self.text_factors})

    def _folded(self, factors: Mapping[str, Pair]) -> dict[str, Pair]:
        return {
            module: (down.float(), up.float() * (self.alphas[module] / len(down)))
            for module, (down, up) in factors.items()
        }

    @property
    def text_parts(self) -> list[str]:
        """Folders of the text encoders that it adapts, such as `text_encoder`."""
        return text_parts(self.text_factors)

    def of_part(self, part: str) -> Adapter:
        """Return the adapter of one text encoder, with its modules as `factors`."""
        return replace(
            self, factors=of_part(self.text_factors, part), alphas=of_part(self.alphas, part), text_factors={}
        )

    @property
    def too_large(self) -> list[str]:
        """Modules whose factors are finite in the file, but not in fp32 with their scale."""
        return [module for module, (_, up) in self.whole().items() if not up.isfinite().all()]


@dataclass(frozen=True)
class Match:
    """The result of matching an adapter to a model: the number of matched tensors, and the unmatched modules."""

    matched: int
    unmatched: tuple[str, ...]


def fold_scale(factors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the `<module>.lora_A` and `.lora_B` tensors with the module's scale folded into B."""
    return {
        name: tensor * scales[name.removesuffix(".lora_B")] if name.endswith(".lora_B") else tensor
        for name, tensor in factors.items()
    }


def write_adapter(folder: Path, factors: Mapping[str, Tensor], contract: Mapping[str, Any]) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` from folded `factors` (see `fold_scale`), in fp32.

    Raises AdapterError, before anything is written, if a tensor is not finite.
    """
    keys = {name: f"{'' if is_text(name) else PREFIX}{name}.weight" for name in factors}
    tensors = {keys[name]: value.detach().float().cpu().contiguous() for name, value in factors.items()}
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        raise AdapterError(f"{folder}: not written: {len(bad)} tensors are NaN or infinite, first {bad[0]}")
    ranks = {name.removesuffix(".lora_A"): len(value) for name, value in factors.items() if name.endswith(".lora_A")}
    path = folder / ADAPTER_FILE
    shown = shown_metadata("diffusers", contract.get("name"), contract)
    save_tensors(path, tensors, {**shown, PEFT_KEY: peft_metadata(ranks), CONTRACT_KEY: contract_metadata(contract)})
    return path


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically."""
    with new_file(path) as temporary:
        save_sorted(temporary, tensors, {"format": "pt", **metadata})


def contract_metadata(contract: Mapping[str, Any]) -> str:
    return json.dumps({"contract_version": CONTRACT_VERSION, **contract}, sort_keys=True)


def find_adapter(location: str | Path) -> Path:
    """Return the adapter file at a file, adapter folder, checkpoint or run folder. Raises AdapterError."""
    path = Path(location).expanduser()
    for candidate in (path, path / ADAPTER_FILE, path / "adapter" / ADAPTER_FILE, path / WEIGHTS_FILE):
        if candidate.is_file():
            return candidate
    if (path / "model" / "model_index.json").is_file():
        raise AdapterError(f"{path}: holds a whole model and no adapter; draw with --base {path / 'model'}")
    if path.is_dir():
        inside = sorted(file for file in path.iterdir() if is_safetensors(file.name) and file.is_file())
        if len(inside) == 1:
            return inside[0]
        raise AdapterError(
            f"{path}: no {ADAPTER_FILE} here or in its adapter/ folder"
            + (f"; name one of {', '.join(file.name for file in inside)}" if inside else "; has the run finished?")
        )
    raise AdapterError(f"{path}: no such file or folder")


def is_safetensors(name: str) -> bool:
    """Return True if a file's name ends with `.safetensors`, in any case."""
    return name.lower().endswith(".safetensors")


def read_file(location: str | Path) -> AdapterFile:
    """Return the tensors and metadata of a safetensors file. Raises AdapterError."""
    path = find_adapter(location)
    if not is_safetensors(path.name):
        raise AdapterError(f"{path}: adapters are read as safetensors only; pickled files can run any code")
    try:
        metadata = read_header(path).metadata
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a mapping)
    except (BadHeader, SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a readable safetensors file: {error}") from error
    return AdapterFile(path, metadata, tensors)


def read_adapter(location: str | Path, *, transformer_only: bool = False) -> Adapter:
    """Read and check a LoRA file in any of the known layouts.

    With `transformer_only`, tensors for the text encoders are ignored and named in the adapter's notes. Raises
    AdapterError for any file that is not a complete, finite, plain LoRA of SD3's transformer and text encoders.
    """
    file = read_file(location)
    contents = interpret(file.tensors)
    if transformer_only:
        file = replace(file, tensors={key: value for key, value in file.tensors.items() if key not in contents.text})
        contents = replace(contents, text_factors={}, unread=contents.text)
    _check(file, contents, transformer_only)
    adapter = as_adapter(file, contents)
    if adapter.too_large:
        raise AdapterError(f"{file.path}: {too_large(adapter)}{WAY_OUT}")
    return adapter


def too_large(adapter: Adapter) -> str:
    """Return a message about alphas that make the scaled weights infinite."""
    module = adapter.too_large[0]
    return f"alpha {adapter.alphas[module]:g} makes the weights of {first_of(adapter.too_large)} infinite"


def as_adapter(file: AdapterFile, contents: Contents) -> Adapter:
    """Return the complete modules of `contents` as an adapter. Raises AdapterError for unusable metadata."""
    ranks = {module: len(down) for module, (down, _) in contents.factors.items()}
    contract = read_contract(file.path, file.metadata)
    peft = read_peft(file.path, file.metadata, contents.layout)
    text_ranks = {module: len(down) for module, (down, _) in contents.text_factors.items()}
    stated = peft.alphas(ranks) | _text_alphas(file, contents.layout, text_ranks) | contents.alphas
    ranks |= text_ranks
    unstated = [] if contract else [module for module in ranks if module not in stated]
    notes = [_no_alpha(file.path, unstated, len(ranks))] if unstated else []
    if contents.unread:
        notes.append(f"left out: {text_part(contents.unread)}")
    return Adapter(
        file.path,
        contents.factors,
        {module: float(rank) for module, rank in ranks.items()} | stated,
        contract,
        contents.layout,
        file.metadata,
        rslora=bool(peft.stated.use_rslora) and not contents.alphas,
        notes=tuple(notes),
        for_diffusers=contents.for_diffusers and peft.file is None and not peft.has_expressions,
        text_factors=contents.text_factors,
    )


def _text_alphas(file: AdapterFile, layout: str, ranks: Mapping[str, int]) -> dict[str, float]:
    """Return the alphas of text encoders' modules that the file's metadata states."""
    found: dict[str, float] = {}
    for part in text_parts(ranks):
        peft = read_peft(file.path, file.metadata, layout, part)
        found |= {f"{part}.{module}": alpha for module, alpha in peft.alphas(of_part(ranks, part)).items()}
    return found


def _no_alpha(path: Path, modules: list[str], total: int) -> str:
    some = "" if len(modules) == total else f" for {first_of(modules)}"
    lacking = f"; {CONFIG_FILE}, which would state it, is not beside the file" if path.name == WEIGHTS_FILE else ""
    return f"no alpha stated{some}, taken as rank{lacking}"


def match(transformer: nn.Module, adapter: Adapter) -> Match:
    """Match the adapter's tensors to modules of `transformer` by name and shape, before anything is loaded.

    Raises AdapterError if a shape differs, or if nothing matches, so that the file would load without effect.
    """
    sizes = {
        name.removesuffix(".base_layer"): _size(module)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    unmatched = tuple(name for name in adapter.factors if name not in sizes)
    for name, (down, up) in adapter.factors.items():
        found, needed = (len(up), down.shape[1]), sizes.get(name)
        if needed is not None and found != needed:
            raise AdapterError(
                f"{adapter.path}: made for another base: {name} is {found[0]}x{found[1]} in the adapter and "
                f"{needed[0]}x{needed[1]} in the model; give the right one with --base"
            )
    if len(unmatched) == len(adapter.factors):
        raise AdapterError(
            f"{adapter.path}: none of its {len(unmatched)} modules exists in this model, so it would have no effect "
            f"(first: {unmatched[0]})"
        )
    return Match(2 * (len(adapter.factors) - len(unmatched)), unmatched)


def _size(module: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Return (outputs, inputs); for a convolution, the inputs of one position."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return module.out_channels, module.in_channels * math.prod(module.kernel_size)


def attach(transformer: Any, adapter: Adapter, name: str) -> Match:
    """Load `adapter` into `transformer` under `name`, in the model's dtype, and count the matched tensors.

    `transformer` is an SD3Transformer2DModel; its active adapters are set by the caller (`set_adapters`).
    """
    counted = match(transformer, adapter)
    loaded = {module: pair for module, pair in adapter.factors.items() if module not in counted.unmatched}
    tensors = {
        f"{PREFIX}{module}.lora_{letter}.weight": tensor.to(transformer.dtype)
        for module, pair in loaded.items()
        for letter, tensor in zip("AB", as_stored(module, pair), strict=True)
    }
    lost = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if lost:
        dtype = str(transformer.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{adapter.path}: {first_of(lost)} is beyond what {dtype} holds; take a wider one, such as --dtype bf16"
        )
    config = peft_arguments(loaded, adapter.alphas)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # a second adapter is intended
        transformer.load_lora_adapter(
            tensors, adapter_name=name, metadata={PREFIX + key: value for key, value in config.items()}
        )
    carried = sum(name in getattr(module, "lora_A", {}) for module in transformer.modules())
    if carried != len(loaded):
        raise AdapterError(f"{adapter.path}: {carried} of {len(loaded)} modules took their weights")
    return counted


def _check(file: AdapterFile, contents: Contents, transformer_only: bool) -> None:
    if not file.tensors and not contents.text:
        raise AdapterError(f"{file.path}: not a LoRA: it holds no tensors")
    if contents.unknown:
        purpose = next(iter(contents.unknown.values()))
        raise AdapterError(
            f"{file.path}: not a LoRA of SD3's transformer alone: {first_of(contents.unknown)} "
            + (f"is {purpose}" if purpose else "belongs to no module of it in any layout that is known")
        )
    if contents.broken:
        module, fault = next(iter(contents.broken.items()))
        raise AdapterError(f"{file.path}: {module}: {fault}")
    if not contents.factors:
        raise AdapterError(f"{file.path}: has nothing for the transformer, only {text_part(contents.text)}")
    if contents.unread and not transformer_only:
        raise AdapterError(
            f"{file.path}: also has {text_part(contents.unread)}, which sd3tune does not load; leave them out with "
            f"--transformer-only (infer and the lora commands), or write a file without them: `sd3tune lora convert "
            f"{shlex.quote(str(file.path))} --transformer-only --to diffusers --out NEW.safetensors`"
        )
    if file.bad:
        raise AdapterError(f"{file.path}: {len(file.bad)} tensors are NaN or infinite, first {file.bad[0]}")
