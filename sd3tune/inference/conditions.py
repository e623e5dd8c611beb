"""The model and settings that all images of a job share: from the job, else from an adapter's contract."""

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
from sd3tune.model.base.offline import name_of_version
from sd3tune.model.base.parts import ENCODER_PARTS, ENCODERS, LABELS
from sd3tune.model.base.resolve import configured_base
from sd3tune.model.load.quantized import missing_library
from sd3tune.reporting import say

DEFAULT_SIDE = 1024


@dataclass(frozen=True)
class Conditions:
    """The model and settings that all images of a job share: from the job, else from the first contract."""

    base: Base
    t5_length: int
    encoders: tuple[str, ...]
    size: tuple[int, int]
    """Default (width, height) in pixels."""
    steps: int
    """Default number of denoising steps, as in the training's previews."""
    guidance: float
    """Default guidance scale, as in the training's previews."""
    noise_offset: float = 0.0
    """Default strength of the offset in the starting noise; see `sampler.add_offset`."""
    base_noise_offset: float = 0.0
    """`noise_offset` for an image of the base alone."""


def settle_conditions(job: InferenceJob, adapters: Sequence[Adapter]) -> Conditions:
    """Return the conditions of a job, and warn where the adapters' contracts disagree with each other or the base.

    Raises AdapterError when no base is named, and ModelError for a base that cannot be used.
    """
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
    given_offset = job.given.get("noise_offset")
    return Conditions(
        base=base,
        t5_length=job.t5_tokens or first.get("max_sequence_length", model.max_sequence_length),
        encoders=encoders,
        size=(side, side),
        **sampling,
        noise_offset=starting_offset(first) if given_offset is None else given_offset,
        base_noise_offset=base.noise_offset if given_offset is None else given_offset,
    )


def _compare_sampling(job: InferenceJob, contracts: Sequence[Mapping[str, Any]]) -> None:
    """Warn if the job leaves steps or guidance to the adapters, and their contracts differ in it."""
    for key in ("steps", "guidance"):
        values = dict.fromkeys(sampling_of(contract)[key] for contract in contracts)
        if len(values) > 1 and key not in job.given:
            first, *others = (f"{value:g}" for value in values)
            say(
                f"warning: the adapters' previews had different {key} ({first}; {', '.join(others)}); "
                f"the first one's is used, --{key} sets another"
            )


def settle_memory(memory: Memory, adapters: Sequence[Adapter]) -> Memory:
    """Return the memory options, filled in from the contract of the first adapter that has one.

    Raises ConfigError if a library that they need is missing.
    """
    trained = next((adapter for adapter in adapters if adapter.contract), None)
    contract: Mapping[str, Any] = trained.contract if trained else {}
    label = trained.label if trained else ""
    if memory.quantize is None:
        form = contract.get("quantize", "none")
        memory = replace(memory, quantize=form)
        if form != "none":
            _announce(f"{label} was trained with its base in {form}", form, "--quantize none takes the whole base")
    if memory.t5_8bit is None:
        memory = replace(memory, t5_8bit=contract.get("t5_quantize") == "int8")
        if memory.t5_8bit:
            _announce(f"{label} was trained with T5 in int8", "int8", "--no-t5-8bit takes the whole T5")
    return memory


def _announce(training: str, form: str, hint: str) -> None:
    problems = missing_library(f"{training}, which", form)
    if problems:
        raise ConfigError(*(f"{line}; {hint}" for line in problems))
    say(f"note: {training}; using the same here; {hint}")


def find_base(name: str | None, adapters: Sequence[Adapter]) -> Base:
    """Return the base `name`, or the one that an adapter names, for work that needs no text encoders."""
    base = configured_base(_find_model(name, None, adapters))
    for adapter in adapters:
        _compare_transformers(adapter, base)
    return base


def _find_model(base: str | None, config: Path | None, adapters: Sequence[Adapter]) -> ModelConfig:
    """Return the location of base, text encoders and tokenizers: `base`, else as the first contract names it.

    An adapter holds no paths, so local ones are read from `config`, else from the configuration of its run.
    """
    adapter = next((adapter for adapter in adapters if adapter.contract), adapters[0] if adapters else None)
    contract = adapter.contract if adapter else {}
    in_card = adapter.base_in_card if adapter else None
    is_local = contract.get("base_kind") in ("folder", "file")
    model = load_config(config).config.model if config else None
    if model is None and adapter is not None and (is_local or contract.get("encoder_files")):
        model = _model_of_run(adapter.path)
    location: dict[str, Any] = {}
    if base is not None:
        location = {"base": base, "revision": None}
    elif adapter is not None and not config:
        if contract.get("base") is None:
            if in_card is None:
                raise AdapterError(f"{adapter.label}: names no base model; give one with --base")
            location = {"base": in_card, "revision": None}
        elif not is_local or (model is None and Path(contract["base"]).exists()):
            name = name_of_version(contract["base"], contract.get("base_fingerprint"))
            location = {"base": name, "revision": contract.get("base_revision")}
        elif model is None or not Path(model.base).exists():
            raise AdapterError(
                f"{adapter.label}: trained on a local {contract['base_kind']} named {contract['base']!r}; "
                "give it with --base"
            )
    trained = {"init": "pretrained", "transformer": None}  # how a run initialized its weights does not matter here
    return (model or ModelConfig()).model_copy(update={**location, **trained})


def _model_of_run(adapter: Path) -> ModelConfig | None:
    """Return the `model` section of the run that contains the adapter; None outside a run."""
    for folder in list(adapter.absolute().parents)[:5]:
        config = folder / "config.yaml"
        if config.is_file() and read_run_file(folder):
            return load_config(config).config.model
    return None


def _compare_transformers(adapter: Adapter, base: Base) -> None:
    """Warn if the adapter was trained on other weights.

    A single file and a folder with the same weights have different fingerprints, so there it is only a note.
    """
    contract = adapter.contract
    expected = contract.get("base_fingerprint")
    if expected and (contract.get("base_kind") == "file") != (base.kind == "file"):
        say(f"note: {adapter.label} was trained on {contract['base']}; {base.name} is assumed to hold the same weights")
    elif expected and expected != base.fingerprint("transformer"):
        trained = name_of_version(contract["base"], expected)
        say(f"warning: {adapter.label} was trained on {trained}, whose weights differ from {base.name}")


def _compare_offsets(adapter: Adapter) -> None:
    """Warn of an adapter by an earlier version, which trained with a noise offset but sampled without it."""
    trained = adapter.contract.get("noise_offset", 0.0)
    if trained and not starting_offset(adapter.contract):
        say(
            f"warning: {adapter.label} was trained with noise offset {trained:g}, by an earlier sd3tune that drew "
            f"without it; --noise-offset {trained:g} draws as it was trained"
        )


def _compare_encoders(adapter: Adapter, base: Base) -> None:
    """Warn if the adapter was trained with other text encoders."""
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
