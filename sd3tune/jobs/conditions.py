"""What an image depends on besides the prompt and the seed: asked for, or taken from the adapter's contract."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sd3tune.errors import AdapterError, ConfigError
from sd3tune.model.adapter_io import Adapter
from sd3tune.model.bases import ENCODERS, Base, resolve_base
from sd3tune.sampling.sampler import SamplerSettings

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
class Conditions:
    """What the images depend on besides prompt and seed: from the request, else from the first contract."""

    base: Base
    t5_length: int
    encoders: tuple[str, ...]
    sampler: SamplerSettings


def parse_lora(value: str) -> tuple[Path, float]:
    """`PATH` or `PATH@weight` -> path and weight (1 when not given). Raises AdapterError."""
    path, at, weight = value.rpartition("@")
    if not at or Path(value).exists():
        return Path(value), 1.0
    try:
        scale = float(weight)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise AdapterError(f"--lora {value}: {weight!r} is not a weight; write PATH@0.8")
    return Path(path), scale


def check_request(request: Request) -> None:
    problems = []
    if not request.loras and request.base is None:
        problems.append("give --lora PATH, or --base to draw with a base model alone")
    for flag, value in (("--num", request.num), ("--steps", request.steps)):
        if value < 1:
            problems.append(f"{flag} {value}: at least 1")
    if not 0 <= request.seed < 2**63:
        problems.append(f"--seed {request.seed}: at least 0, and below 2^63")
    if not math.isfinite(request.guidance):
        problems.append(f"--guidance {request.guidance}: a finite number")
    if request.size and (request.size[0] % 16 or request.size[1] % 16 or min(request.size) < 16):
        problems.append(f"--size {request.size[0]}x{request.size[1]}: both sides must be multiples of 16")
    if problems:
        raise ConfigError(*problems)


def check_size(settings: SamplerSettings, transformer: Any) -> None:
    largest = transformer.config.pos_embed_max_size * transformer.config.patch_size * 8
    if max(settings.width, settings.height) > largest:
        raise ConfigError(f"--size {settings.width}x{settings.height}: this base draws at most {largest} pixels a side")


def settle_conditions(request: Request, adapters: Sequence[Adapter]) -> Conditions:
    contracts = [adapter.contract for adapter in adapters]
    first: Mapping[str, Any] = contracts[0] if contracts else {}
    for key in ("max_sequence_length", "encoders"):
        if len({json.dumps(contract.get(key)) for contract in contracts}) > 1:
            print(f"warning: the adapters were trained with different {key}; the first one's is used")
    width, height = request.size or (first.get("resolution", DEFAULT_SIDE),) * 2
    return Conditions(
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
            print(
                f"warning: {adapter.path} was trained on {adapter.contract['base']}, whose weights differ from {name}"
            )
    return base


def _folder_of_run(adapter: Path) -> str | None:
    """The base folder in the `config.yaml` of the run that the adapter lies in."""
    for folder in list(adapter.absolute().parents)[:5]:
        config = folder / "config.yaml"
        if config.is_file() and (folder / "run.json").is_file():
            return str(yaml.safe_load(config.read_text(encoding="utf-8"))["model"]["base"])
    return None
