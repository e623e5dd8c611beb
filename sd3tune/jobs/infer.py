"""`sd3tune infer`: images from adapters, with the conditioning that they were trained under."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from sd3tune import __version__
from sd3tune.encode.resources import release
from sd3tune.errors import AdapterError, ConfigError, RunError
from sd3tune.jobs.machine import choose_dtype, dtype_name, make_accelerator
from sd3tune.model.adapter_io import Adapter, attach, match, read_adapter
from sd3tune.model.bases import ENCODERS, Base, resolve_base
from sd3tune.model.components import empty_transformer, load_scheduler, load_text_encoder, load_transformer, load_vae
from sd3tune.model.text import assemble
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sampler import Conditioning, SamplerSettings, sample_latents, to_image

DEFAULT_SIDE, DEFAULT_T5_LENGTH = 1024, 256


@dataclass(frozen=True)
class Request:
    """What to draw, as given on the command line; None leaves it to the adapter's contract."""

    loras: Sequence[str]
    """`PATH` or `PATH@weight`."""
    prompt: str
    out: Path
    negative: str = ""
    seed: int = 0
    steps: int = 28
    guidance: float = 7.0
    size: tuple[int, int] | None = None
    """(width, height) in pixels."""
    num: int = 1
    base: str | None = None
    dtype: str = "auto"
    before: bool = True
    """Whether the untrained base is drawn too, for the picture of both."""


@dataclass(frozen=True)
class _Conditions:
    """What the images depend on besides prompt and seed: from the request, else from the first contract."""

    base: Base
    t5_length: int
    encoders: tuple[str, ...]
    sampler: SamplerSettings


@dataclass(frozen=True)
class _Prompt:
    positive: Conditioning
    negative: Conditioning


def run_infer(request: Request) -> list[Path]:
    """Draw `request.num` images and, beside them, one picture of before and after. Returns the files written."""
    _check(request)
    adapters = [(read_adapter(path), weight) for path, weight in map(parse_lora, request.loras)]
    device = make_accelerator().device
    dtype = choose_dtype(request.dtype, device)
    conditions = _conditions(request, [adapter for adapter, _ in adapters])
    skeleton = empty_transformer(conditions.base)
    _check_size(conditions.sampler, skeleton)
    for adapter, _ in adapters:
        match(skeleton, adapter)  # before anything large is loaded
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: {request.out} cannot be made: {error.strerror}") from error

    prompt = _encode(request, conditions, dtype, device, skeleton.config.joint_attention_dim)
    drawn = _draw(request, conditions, prompt, adapters, dtype, device)
    vae = load_vae(conditions.base, torch.float32 if dtype is torch.float16 else dtype, device)
    images = {name: [to_image(vae, latents) for latents in of] for name, of in drawn.items()}
    return _write(request, conditions, adapters, dtype, images)


def parse_lora(value: str) -> tuple[Path, float]:
    """`PATH` or `PATH@weight` -> path and weight (1 when not given). Raises AdapterError."""
    path, at, weight = value.rpartition("@")
    if not at or Path(value).exists():
        return Path(value), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise AdapterError(f"--lora {value}: {weight!r} is not a weight; write PATH@0.8") from None


def _check(request: Request) -> None:
    problems = []
    if not request.loras and request.base is None:
        problems.append("give --lora PATH, or --base to draw with a base model alone")
    for flag, value in (("--num", request.num), ("--steps", request.steps)):
        if value < 1:
            problems.append(f"{flag} {value}: at least 1")
    if request.seed < 0:
        problems.append(f"--seed {request.seed}: at least 0")
    if request.size and (request.size[0] % 16 or request.size[1] % 16 or min(request.size) < 16):
        problems.append(f"--size {request.size[0]}x{request.size[1]}: both sides must be multiples of 16")
    if problems:
        raise ConfigError(*problems)


def _check_size(settings: SamplerSettings, transformer: Any) -> None:
    largest = transformer.config.pos_embed_max_size * transformer.config.patch_size * 8
    if max(settings.width, settings.height) > largest:
        raise ConfigError(f"--size {settings.width}x{settings.height}: this base draws at most {largest} pixels a side")


def _conditions(request: Request, adapters: Sequence[Adapter]) -> _Conditions:
    contracts = [adapter.contract for adapter in adapters]
    first: Mapping[str, Any] = contracts[0] if contracts else {}
    for key in ("max_sequence_length", "encoders"):
        if len({json.dumps(contract.get(key)) for contract in contracts}) > 1:
            print(f"warning: the adapters were trained with different {key}; the first one's is used")
    width, height = request.size or (first.get("resolution", DEFAULT_SIDE),) * 2
    return _Conditions(
        base=_find_base(request, adapters),
        t5_length=first.get("max_sequence_length", DEFAULT_T5_LENGTH),
        encoders=tuple(first.get("encoders", ENCODERS)),
        sampler=SamplerSettings(request.steps, request.guidance, height, width),
    )


def _find_base(request: Request, adapters: Sequence[Adapter]) -> Base:
    """`--base`, else the one that the first adapter names; warns when it is not the one it was trained on."""
    name, revision = request.base, None
    if name is None:
        contract = adapters[0].contract
        name, revision = contract.get("base"), contract.get("base_revision")
        if name is None:
            raise AdapterError(f"{adapters[0].path}: does not say which base it is for; give it with --base")
        if contract.get("base_kind") == "folder":
            name = _folder_of_run(adapters[0].path) or name
            if not Path(name).is_dir():
                raise AdapterError(f"{adapters[0].path}: trained on a local folder named {name!r}; give it with --base")
    base = resolve_base(name, revision)
    for adapter in adapters:
        expected = adapter.contract.get("base_fingerprint")
        if expected and expected != base.fingerprint("transformer"):
            print(f"warning: {adapter.path} was trained on {adapter.contract['base']}, whose weights differ from {name}")
    return base


def _folder_of_run(adapter: Path) -> str | None:
    """The base folder in the `config.yaml` of the run that the adapter lies in."""
    for folder in list(adapter.parents)[:5]:
        config = folder / "config.yaml"
        if config.is_file() and (folder / "run.json").is_file():
            return str(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["base"])
    return None


def _encode(
    request: Request, conditions: _Conditions, dtype: torch.dtype, device: torch.device, joint_dim: int
) -> _Prompt:
    """Both prompts through one text encoder at a time."""
    texts = [request.prompt, request.negative]
    entries: dict[str, list[dict[str, torch.Tensor]]] = {}
    for name in tqdm(conditions.encoders, desc="encoding the prompt", unit="encoder", leave=False, delay=2):
        encoder = load_text_encoder(conditions.base, name, dtype, device, conditions.t5_length)
        entries[name] = encoder.encode(texts)
        lost = encoder.truncated(request.prompt)
        if lost:
            print(f"warning: {name} reads {encoder.max_length} tokens; the last {lost} of the prompt are cut off")
        del encoder
        release(device)

    def conditioning(number: int) -> Conditioning:
        batch = {
            name: {key: value[None] for key, value in entry[number].items()} for name, entry in entries.items()
        }
        t5 = batch["t5"]["hidden"] if "t5" in batch else None
        return Conditioning(*assemble(batch["clip_l"], batch["clip_g"], t5, conditions.t5_length, joint_dim))

    return _Prompt(conditioning(0), conditioning(1))


def _draw(
    request: Request,
    conditions: _Conditions,
    prompt: _Prompt,
    adapters: Sequence[tuple[Adapter, float]],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, list[torch.Tensor]]:
    """Latents by picture: `after` with the adapters and, if wanted, `before` without."""
    transformer = load_transformer(conditions.base, dtype, device)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (adapter, weight) in zip(names, adapters, strict=True):
        counted = attach(transformer, adapter, name)
        print(f"{adapter.path}: {counted.matched} tensors loaded, weight {weight:g}")
        if counted.unmatched:
            some = ", ".join(counted.unmatched[:3])
            print(f"warning: {len(counted.unmatched)} of its modules are not in this base: {some}")
    if adapters:
        transformer.set_adapters(names, [weight for _, weight in adapters])
    passes = ["after"] + (["before"] if adapters and request.before else [])
    scheduler = load_scheduler(conditions.base)
    drawn: dict[str, list[torch.Tensor]] = {}
    total = len(passes) * request.num * request.steps
    with tqdm(total=total, desc="drawing", unit="step") as bar:
        for name in passes:
            if name == "before":
                transformer.disable_adapters()
            drawn[name] = [
                sample_latents(
                    transformer, scheduler, prompt.positive, prompt.negative, conditions.sampler,
                    request.seed + number, on_step=bar.update,
                )  # fmt: skip
                for number in range(request.num)
            ]
    del transformer
    release(device)
    return drawn


def _write(
    request: Request,
    conditions: _Conditions,
    adapters: Sequence[tuple[Adapter, float]],
    dtype: torch.dtype,
    images: Mapping[str, Sequence[Image.Image]],
) -> list[Path]:
    recipe = {
        "sd3tune": __version__,
        "prompt": request.prompt,
        "negative": request.negative,
        "steps": request.steps,
        "guidance": request.guidance,
        "size": [conditions.sampler.width, conditions.sampler.height],
        "base": conditions.base.path.name if conditions.base.kind == "folder" else conditions.base.name,
        "base_revision": conditions.base.revision,
        "max_sequence_length": conditions.t5_length,
        "encoders": list(conditions.encoders),
        "dtype": dtype_name(dtype),
        "loras": [
            {"name": _name_of(adapter.path), "sha256": _sha256(adapter.path), "weight": weight}
            for adapter, weight in adapters
        ],
    }
    stem = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:60] or "image"
    written = []
    for number, image in enumerate(images["after"]):
        seed = request.seed + number
        path = _unused(request.out / f"{stem}-seed{seed}.png")
        _save(image, path, {**recipe, "seed": seed})
        written.append(path)
    if "before" in images:
        path = _unused(request.out / f"{stem}-seed{request.seed}-before-after.png")
        rows = [images["before"], images["after"]]
        columns = [f"seed {request.seed + number}" for number in range(request.num)]
        side = min(512, max(conditions.sampler.width, conditions.sampler.height, 128))
        _save(contact_sheet(rows, columns, ["before: the base alone", "after: with the adapter"], side), path, recipe)
        written.append(path)
    return written


def _save(image: Image.Image, path: Path, recipe: Mapping[str, Any]) -> None:
    info = PngInfo()
    info.add_itxt("sd3tune", json.dumps(recipe, ensure_ascii=False))
    try:
        image.save(path, pnginfo=info)
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


def _unused(path: Path) -> Path:
    """`path`, or the first of `-2`, `-3`, ... that does not exist: earlier images are never overwritten."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_stem(f"{path.stem}-{number}")
    return candidate


def _name_of(adapter: Path) -> str:
    """A name for people: the run's or folder's, never the path."""
    return next(part for part in reversed(adapter.parts[:-1]) if part not in ("adapter", "adapter_raw", "checkpoints"))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


