"""What an image depends on besides the prompt and the seed: asked for, or taken from a contract."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config import ModelConfig, load_config
from sd3tune.errors import AdapterError, ConfigError
from sd3tune.model.adapter_io import Adapter
from sd3tune.model.bases import ENCODER_PARTS, ENCODERS, Base, configured_base
from sd3tune.model.checkpoint import LABELS
from sd3tune.sampling.sampler import SamplerSettings

DEFAULT_SIDE = 1024


@dataclass(frozen=True)
class Request:
    """What to draw, as given on the command line; None leaves it to the adapter's contract, or the model's own."""

    loras: Sequence[str]
    """`PATH` or `user/name[:revision]`, each with `@weight` if it is not 1."""
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
    config: Path | None = None
    """A YAML whose `model` section says where the base, text encoders and tokenizers are; `base` wins over its base."""
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


def parse_lora(value: str, flag: str = "--lora ") -> tuple[Path, float]:
    """`PATH`, `user/name:revision` or either with `@weight` -> that, and the weight (1 when not given).

    Raises AdapterError.
    """
    path, at, weight = value.rpartition("@")
    if not at or Path(value).exists():
        return Path(value), 1.0
    try:
        scale = float(weight)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise AdapterError(
            f"{flag}{value}: {weight!r} is not a weight; write PATH@0.8, or for a revision user/name:revision"
        )
    return Path(path), scale


def check_request(request: Request) -> None:
    problems = []
    if not request.loras and request.base is None and request.config is None:
        problems.append("give --lora PATH, or --base (or --config) to draw with a base model alone")
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
    contracts = [adapter.contract for adapter in adapters if adapter.contract]
    for key in ("max_sequence_length", "encoders"):
        if len({json.dumps(contract.get(key)) for contract in contracts}) > 1:
            print(f"warning: the adapters were trained with different {key}; the first one's is used")
    model = _find_model(request, adapters)
    base = configured_base(model)
    first: Mapping[str, Any] = contracts[0] if contracts else base.contract
    width, height = request.size or (first.get("resolution", DEFAULT_SIDE),) * 2
    encoders = tuple(first.get("encoders", ENCODERS if model.t5 else [name for name in ENCODERS if name != "t5"]))
    base.check_encoders(encoders)
    if base.distilled and request.guidance > 1:
        print(f"warning: {base.label} is a Turbo model: it draws with --guidance 1 and --steps 4")
    for adapter in adapters:
        _compare_transformers(adapter, base)
        _compare_encoders(adapter, base)
    return Conditions(
        base=base,
        t5_length=first.get("max_sequence_length", model.max_sequence_length),
        encoders=encoders,
        sampler=SamplerSettings(request.steps, request.guidance, height, width),
    )


def find_base(name: str | None, adapters: Sequence[Adapter]) -> Base:
    """The base called `name`, or the one that an adapter names, for work that needs no text encoders."""
    request = Request(loras=[str(adapter.path) for adapter in adapters], prompt="", out=Path(), base=name)
    base = configured_base(_find_model(request, adapters))
    for adapter in adapters:
        _compare_transformers(adapter, base)
    return base


def _find_model(request: Request, adapters: Sequence[Adapter]) -> ModelConfig:
    """Where the base is: `--base`, else the one that an adapter names (the first that says anything), with text
    encoders and tokenizers.

    Paths are not in an adapter, so what needs them is read from `--config`, else from the run's own configuration.
    """
    named = next((adapter for adapter in adapters if adapter.contract), adapters[0] if adapters else None)
    contract = named.contract if named else {}
    in_card = named.base_in_card if named else None
    is_local = contract.get("base_kind") in ("folder", "file")
    model = load_config(request.config).config.model if request.config else None
    if model is None and named is not None and (is_local or contract.get("encoder_files")):
        model = _model_of_run(named.path)
    where: dict[str, Any] = {}
    if request.base is not None:
        where = {"base": request.base, "revision": None}
    elif named is not None and not request.config:
        if contract.get("base") is None:
            if in_card is None:
                raise AdapterError(f"{named.label}: does not say which base it is for; give it with --base")
            where = {"base": in_card, "revision": None}
        elif not is_local or (model is None and Path(contract["base"]).exists()):
            where = {"base": contract["base"], "revision": contract.get("base_revision")}
        elif model is None or not Path(model.base).exists():
            raise AdapterError(
                f"{named.label}: trained on a local {contract['base_kind']} named {contract['base']!r}; "
                "give it with --base"
            )
    trained = {"init": "pretrained", "transformer": None}  # whatever a run began with
    return (model or ModelConfig()).model_copy(update={**where, **trained})


def _model_of_run(adapter: Path) -> ModelConfig | None:
    """The `model` section in the `config.yaml` of the run that the adapter lies in."""
    for folder in list(adapter.absolute().parents)[:5]:
        config = folder / "config.yaml"
        if config.is_file() and (folder / "run.json").is_file():
            return load_config(config).config.model
    return None


def _compare_transformers(adapter: Adapter, base: Base) -> None:
    """Warn when the adapter was trained on other weights. Files and folders hold the same ones in other shapes."""
    contract = adapter.contract
    expected = contract.get("base_fingerprint")
    if expected and (contract.get("base_kind") == "file") != (base.kind == "file"):
        print(f"note: {adapter.label} was trained on {contract['base']}; {base.name} is taken to hold the same weights")
    elif expected and expected != base.fingerprint("transformer"):
        print(f"warning: {adapter.label} was trained on {contract['base']}, whose weights differ from {base.name}")


def _compare_encoders(adapter: Adapter, base: Base) -> None:
    for encoder, trained in adapter.contract.get("encoder_files", {}).items():
        if trained["fingerprint"] != base.fingerprint(ENCODER_PARTS[encoder][1]):
            print(
                f"warning: {adapter.label} was trained with {LABELS[encoder]} from {trained['file']}, and another is "
                "used here; --config YAML takes the text encoders of its model section"
            )
