"""What all images of a job depend on: asked for, or taken from a contract."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3tune.adapter.file import Adapter
from sd3tune.config import ModelConfig, load_config
from sd3tune.config.run_folder import read_run_file
from sd3tune.errors import AdapterError, ConfigError
from sd3tune.inference.job import InferenceJob, Memory
from sd3tune.model.base.base import Base
from sd3tune.model.base.contract import sampling_of, starting_offset
from sd3tune.model.base.parts import ENCODER_PARTS, ENCODERS, LABELS
from sd3tune.model.base.resolve import configured_base
from sd3tune.model.load.quantized import missing_library
from sd3tune.reporting import say

DEFAULT_SIDE = 1024


@dataclass(frozen=True)
class Conditions:
    """What all images of a job depend on: from the job, else from the first contract."""

    base: Base
    t5_length: int
    encoders: tuple[str, ...]
    size: tuple[int, int]
    """(width, height) of an image that is not given one."""
    steps: int
    guidance: float
    """Of an image that is not given them: those of the previews of the training."""
    noise_offset: float = 0.0
    """Of the starting noise of an image that is not given one; see `sampler.add_offset`."""
    base_noise_offset: float = 0.0
    """The same for an image of the base alone."""


def settle_conditions(job: InferenceJob, adapters: Sequence[Adapter]) -> Conditions:
    contracts = [adapter.contract for adapter in adapters if adapter.contract]
    for key in ("max_sequence_length", "encoders", "sampler_noise_offset"):
        if len({json.dumps(contract.get(key)) for contract in contracts}) > 1:
            say(f"warning: the adapters were trained with different {key}; the first one's is used")
    _compare_sampling(job, contracts)
    model = _find_model(job.base, job.config, adapters)
    if job.revision is not None:
        model = model.model_copy(update={"revision": job.revision})
    base = configured_base(model)
    first: Mapping[str, Any] = contracts[0] if contracts else base.contract
    side = first.get("resolution", DEFAULT_SIDE)
    trained = first.get("encoders", ENCODERS if model.t5 else [name for name in ENCODERS if name != "t5"])
    t5 = "t5" in trained if job.t5 is None else job.t5
    encoders = tuple(name for name in ENCODERS if t5 or name != "t5")
    base.check_encoders(encoders)
    sampling = sampling_of(first)
    guidance = job.given.get("guidance", sampling["guidance"])
    if base.distilled and guidance > 1:
        say(f"warning: {base.label} is a Turbo model: it draws with --guidance 1 and --steps 4")
    for adapter in adapters:
        _compare_transformers(adapter, base)
        _compare_encoders(adapter, base)
        if "noise_offset" not in job.given:
            _compare_offsets(adapter)
    asked = job.given.get("noise_offset")
    return Conditions(
        base=base,
        t5_length=job.t5_tokens or first.get("max_sequence_length", model.max_sequence_length),
        encoders=encoders,
        size=(side, side),
        **sampling,
        noise_offset=starting_offset(first) if asked is None else asked,
        base_noise_offset=base.noise_offset if asked is None else asked,
    )


def _compare_sampling(job: InferenceJob, contracts: Sequence[Mapping[str, Any]]) -> None:
    """Warn of previews with other settings, where the job leaves them to the adapters."""
    for key in ("steps", "guidance"):
        values = dict.fromkeys(sampling_of(contract)[key] for contract in contracts)
        if len(values) > 1 and key not in job.given:
            first, *others = (f"{value:g}" for value in values)
            say(
                f"warning: the adapters' previews had different {key} ({first}; {', '.join(others)}); "
                f"the first one's is used, --{key} sets another"
            )


def settle_memory(memory: Memory, adapters: Sequence[Adapter]) -> Memory:
    """Return the memory options, by default those that the first adapter was trained with.

    Raises ConfigError where a library for them is missing.
    """
    trained = next((adapter for adapter in adapters if adapter.contract), None)
    contract: Mapping[str, Any] = trained.contract if trained else {}
    label = trained.label if trained else ""
    if memory.quantize is None:
        form = contract.get("quantize", "none")
        memory = replace(memory, quantize=form)
        if form != "none":
            _announce(f"{label} was trained with its base in {form}", "--quantize none takes the whole base")
        if form == "int8" and memory.offload:
            raise ConfigError("--offload: layers in int8 stay on their device; leave it out, or take --quantize none")
    if memory.t5_8bit is None:
        memory = replace(memory, t5_8bit=contract.get("t5_quantize") == "int8")
        if memory.t5_8bit:
            _announce(f"{label} was trained with T5 in int8", "--no-t5-8bit takes the whole T5")
    return memory


def _announce(said: str, way_out: str) -> None:
    problems = missing_library(f"{said}, which")
    if problems:
        raise ConfigError(*(f"{line}; {way_out}" for line in problems))
    say(f"note: {said}; using the same here; {way_out}")


def find_base(name: str | None, adapters: Sequence[Adapter]) -> Base:
    """Find the base `name`, or the one that an adapter names, for work that needs no text encoders."""
    base = configured_base(_find_model(name, None, adapters))
    for adapter in adapters:
        _compare_transformers(adapter, base)
    return base


def _find_model(base: str | None, config: Path | None, adapters: Sequence[Adapter]) -> ModelConfig:
    """Return where base, text encoders and tokenizers are: `base`, else what the first adapter with a contract names.

    An adapter holds no paths, so local ones are read from `config`, else from the configuration of its run.
    """
    named = next((adapter for adapter in adapters if adapter.contract), adapters[0] if adapters else None)
    contract = named.contract if named else {}
    in_card = named.base_in_card if named else None
    is_local = contract.get("base_kind") in ("folder", "file")
    model = load_config(config).config.model if config else None
    if model is None and named is not None and (is_local or contract.get("encoder_files")):
        model = _model_of_run(named.path)
    where: dict[str, Any] = {}
    if base is not None:
        where = {"base": base, "revision": None}
    elif named is not None and not config:
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
    trained = {"init": "pretrained", "transformer": None}  # a run's starting weights do not matter here
    return (model or ModelConfig()).model_copy(update={**where, **trained})


def _model_of_run(adapter: Path) -> ModelConfig | None:
    """Return the `model` section of the run that the adapter lies in."""
    for folder in list(adapter.absolute().parents)[:5]:
        config = folder / "config.yaml"
        if config.is_file() and read_run_file(folder):
            return load_config(config).config.model
    return None


def _compare_transformers(adapter: Adapter, base: Base) -> None:
    """Warn when the adapter was trained on other weights. Files and folders hold the same ones in other shapes."""
    contract = adapter.contract
    expected = contract.get("base_fingerprint")
    if expected and (contract.get("base_kind") == "file") != (base.kind == "file"):
        say(f"note: {adapter.label} was trained on {contract['base']}; {base.name} is taken to hold the same weights")
    elif expected and expected != base.fingerprint("transformer"):
        say(f"warning: {adapter.label} was trained on {contract['base']}, whose weights differ from {base.name}")


def _compare_offsets(adapter: Adapter) -> None:
    """Warn of an adapter by an earlier version, which trained with a noise offset and drew without one."""
    trained = adapter.contract.get("noise_offset", 0.0)
    if trained and not starting_offset(adapter.contract):
        say(
            f"warning: {adapter.label} was trained with noise offset {trained:g}, by an earlier sd3tune that drew "
            f"without it; --noise-offset {trained:g} draws as it was trained"
        )


def _compare_encoders(adapter: Adapter, base: Base) -> None:
    for encoder, trained in adapter.contract.get("encoder_files", {}).items():
        part = ENCODER_PARTS[encoder][1]
        if trained["fingerprint"] == base.fingerprint(part):
            continue
        if trained["fingerprint"] == base.fingerprint(part, uses_all=True):
            say(
                f"warning: {adapter.label} was trained with the text_projection of {trained['file']}, by an earlier "
                "sd3tune; Stable Diffusion 3 does not use it, and neither do these pictures"
            )
        else:
            say(
                f"warning: {adapter.label} was trained with {LABELS[encoder]} from {trained['file']}, and another is "
                "used here; --config YAML takes the text encoders of its model section"
            )
