"""The adapter file, which diffusers and ComfyUI load unchanged, and its conditioning contract.

Keys are diffusers' (`transformer.<module>.lora_A.weight`). Other tools' layouts are read too (see `layouts`, and
`peft_config` for PEFT's folders). The scale alpha / r is folded into B and alpha = r is written, so a loader that
ignores alpha computes the same. The metadata holds PEFT's configuration (`lora_adapter_metadata`, as diffusers writes
it), the contract (`sd3tune`), which `infer` applies, and the keys that other programs show (see `modelspec`). It
contains no time, host or path.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.adapter.contents import Contents, Pair
from sd3tune.adapter.dora import OF_BASE, OF_BASE_KEY, per_output
from sd3tune.adapter.layouts import DORA_SCALE, MAGNITUDE
from sd3tune.adapter.lycoris import Parts, kind_of, rank_of, scaled, size_of
from sd3tune.adapter.metadata import CONTRACT_KEY, PEFT_KEY, PREFIX, is_safetensors, read_contract, read_tensors
from sd3tune.adapter.modelspec import shown_metadata
from sd3tune.adapter.names import ADAPTER_FILE as ADAPTER_FILE
from sd3tune.adapter.peft_config import CONFIG_FILE, WEIGHTS_FILE, PeftConfig, peft_metadata, read_peft
from sd3tune.adapter.rearrange import READABLE, first_of, interpret, text_part
from sd3tune.adapter.text_layouts import is_text, of_part, text_parts
from sd3tune.errors import AdapterError
from sd3tune.files.atomic import new_file
from sd3tune.files.tensors import save_sorted
from sd3tune.model.base.contract import CONTRACT_VERSION, WAY_OUT


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
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    """Module name -> DoRA's magnitude: [out], or [1, in] for one per input."""
    of_base: bool = False
    """True if the magnitudes are for ComfyUI's norm (see `dora`)."""
    lycoris: Mapping[str, Parts] = field(default_factory=dict)
    """Module name -> its parts of LoHa or LoKr, with the scale in the first one."""
    text_factors: Mapping[str, Pair] = field(default_factory=dict)
    """The same as `factors` for the text encoders; names begin with their folder (see `text_layouts`)."""

    @property
    def kind(self) -> str:
        """`LoRA`, `LoHa` or `LoKr`; with magnitudes `DoRA`, or `LoKr with DoRA's magnitudes`."""
        plain = {"loha": "LoHa", "lokr": "LoKr"}[kind_of(next(iter(self.lycoris.values())))] if self.lycoris else "LoRA"
        if not self.magnitudes:
            return plain
        return "DoRA" if plain == "LoRA" else f"{plain} with DoRA's magnitudes"

    @property
    def by_lora_layers(self) -> bool:
        """True if PEFT's LoRA layers compute it: not LoHa or LoKr, nor DoRA with one magnitude per input."""
        return not self.lycoris and all(per_output(magnitude) for magnitude in self.magnitudes.values())

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module name -> (outputs, inputs)."""
        plain = {module: (len(up), down.shape[1]) for module, (down, up) in self.factors.items()}
        return plain | {module: size_of(parts) for module, parts in self.lycoris.items()}

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
        factors, alphas = of_part(self.text_factors, part), of_part(self.alphas, part)
        return replace(self, factors=factors, alphas=alphas, text_factors={}, magnitudes={}, lycoris={})

    @property
    def too_large(self) -> list[str]:
        """Modules whose factors are finite in the file, but not in fp32 with their scale."""
        parts = {module: list(of.values()) for module, of in self.lycoris.items()}
        scaled = parts | {module: [up] for module, (_, up) in self.whole().items()}
        return [module for module, tensors in scaled.items() if not all(one.isfinite().all() for one in tensors)]


def fold_scale(factors: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Tensor]:
    """Return the `<module>.lora_A` and `.lora_B` tensors with the module's scale folded into B."""
    return {
        name: tensor * scales[name.removesuffix(".lora_B")] if name.endswith(".lora_B") else tensor
        for name, tensor in factors.items()
    }


def _key(name: str) -> str:
    """Return a tensor's key in the file; LoRA's factors are modules in PEFT, and other tensors parameters."""
    return PREFIX * (not is_text(name)) + name + ".weight" * name.endswith((".lora_A", ".lora_B"))


def in_dtype(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor as a file in `dtype` holds it.

    DoRA's magnitudes stay fp32: they are as large as norms of weights, and training changes them by little.
    """
    return value.float() if name.endswith((MAGNITUDE, DORA_SCALE)) else value.to(dtype)


def write_adapter(
    folder: Path, factors: Mapping[str, Tensor], contract: Mapping[str, Any], dtype: torch.dtype = torch.float32
) -> Path:
    """Write `folder/pytorch_lora_weights.safetensors` from folded `factors` (see `fold_scale`), in `dtype`.

    Raises AdapterError, before anything is written, if a tensor is not finite.
    """
    tensors = {_key(name): in_dtype(name, value.detach().cpu(), dtype).contiguous() for name, value in factors.items()}
    check_finite(folder, tensors, dtype)
    ranks = {name.removesuffix(".lora_A"): len(value) for name, value in factors.items() if name.endswith(".lora_A")}
    peft = peft_metadata(ranks, dora=any(name.endswith(MAGNITUDE) for name in factors))
    return write_described(folder / ADAPTER_FILE, tensors, peft, contract)


def write_described(path: Path, tensors: dict[str, Tensor], peft: str, contract: Mapping[str, Any]) -> Path:
    """Write an adapter's tensors with the metadata of its contract and PEFT's configuration. Return the path."""
    shown = shown_metadata("diffusers", contract.get("name"), contract)
    save_tensors(path, tensors, {**shown, PEFT_KEY: peft, CONTRACT_KEY: contract_metadata(contract)})
    return path


def check_finite(place: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Raise AdapterError if a tensor to be written in `dtype` is not finite."""
    bad = [name for name, value in tensors.items() if not value.isfinite().all()]
    if bad:
        way_out = "; method.export_dtype=bf16 has a wider range" if dtype is torch.float16 else ""
        raise AdapterError(f"{place}: not written: {len(bad)} tensors are NaN or infinite, first {bad[0]}{way_out}")


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
    if (path / "embedding").is_dir():
        raise AdapterError(f"{path}: holds the embedding of a token and no adapter; draw with --embedding {path}")
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


def read_file(location: str | Path) -> AdapterFile:
    """Return the tensors and metadata of a safetensors file. Raises AdapterError."""
    path = find_adapter(location)
    tensors, metadata = read_tensors(path, "adapters")
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
    scale = f"alpha {adapter.alphas[module]:g}" if module in adapter.alphas else "the scale"
    return f"{scale} makes the weights of {first_of(adapter.too_large)} infinite"


def as_adapter(file: AdapterFile, contents: Contents) -> Adapter:
    """Return the complete modules of `contents` as an adapter. Raises AdapterError for unusable metadata."""
    ranks = {module: len(down) for module, (down, _) in contents.factors.items()}
    contract = read_contract(file.path, file.metadata)
    peft = read_peft(file.path, file.metadata, contents.layout)
    _check_kind(f"{peft.file or f'{file.path}: its metadata {PEFT_KEY!r}'}", peft, contents)
    lycoris = {module: scaled(parts, peft.scale(module, rank_of(parts))) for module, parts in contents.lycoris.items()}
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
        magnitudes=contents.magnitudes,
        of_base=file.metadata.get(OF_BASE_KEY) == OF_BASE,
        lycoris=lycoris,
    )


def _check_kind(where: str, peft: PeftConfig, contents: Contents) -> None:
    """Raise AdapterError, a line that begins with `where`, if PEFT's configuration is for another kind of adapter."""
    kind, stated = kind_of(next(iter(contents.lycoris.values()))) if contents.lycoris else "lora", peft.stated
    if stated.peft_type not in (None, kind.upper()):
        raise AdapterError(f'{where}: peft_type: "{stated.peft_type}" is not supported, as its tensors are of {kind}')
    if stated.use_dora and not contents.magnitudes:
        raise AdapterError(f"{where}: use_dora: true is not supported, as the file has no magnitudes")


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
    if contents.factors and contents.lycoris:
        raise AdapterError(
            f"{file.path}: {next(iter(contents.factors))} is LoRA and {next(iter(contents.lycoris))} is LoHa or LoKr; "
            "files of several kinds are not read"
        )
    if not contents.sizes:
        raise AdapterError(f"{file.path}: has nothing for the transformer, only {text_part(contents.text)}")
    if contents.unread and not transformer_only:
        raise AdapterError(
            f"{file.path}: also has {text_part(contents.unread)}, which sd3tune does not load; leave them out with "
            f"--transformer-only (infer and the lora commands), or write a file without them: `sd3tune lora convert "
            f"{shlex.quote(str(file.path))} --transformer-only --to diffusers --out NEW.safetensors`"
        )
    if file.bad:
        raise AdapterError(f"{file.path}: {len(file.bad)} tensors are NaN or infinite, first {file.bad[0]}")
