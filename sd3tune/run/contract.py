"""The conditioning contract of a run's result, the run's identity for resuming, and the start of `run.json`."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from sd3tune import __version__
from sd3tune.adapter.modelspec import tag_frequency
from sd3tune.config import Config, load_config
from sd3tune.config.meaning import compared_when_finished, contract_of, identity_of
from sd3tune.config.sections.model import ModelConfig
from sd3tune.data.concepts import are_told_apart, concepts_of
from sd3tune.data.store import key
from sd3tune.errors import ConfigError, RunError
from sd3tune.model.base.contract import declared
from sd3tune.model.base.parts import ENCODER_PARTS, VARIANTS
from sd3tune.model.base.single_file_header import released_shape
from sd3tune.run.captions import own_readers
from sd3tune.run.earlier import began_in_llm_int8, drops_kept_captions, may_drop_kept
from sd3tune.run.encoding import Encoded
from sd3tune.run.preflight import Plan
from sd3tune.run.saved import saved_identity
from sd3tune.run.streaming import streamed_content
from sd3tune.runtime.device import dtype_name, gpu_of, versions
from sd3tune.training.checkpoint import differences
from sd3tune.training.examples import content_of


def make_contract(plan: Plan) -> dict[str, Any]:
    """Return the contract: all that inference needs to match training. It holds no time, host name or path.

    `model.base.contract.Contract` declares its keys; those of a method are declared on its section.
    """
    config = plan.config
    captions = sorted({caption.text for record in plan.records for caption in record.drawn})
    of_the_run = {
        "sd3tune_version": __version__,
        "base": plan.base.label,
        "base_kind": plan.base.kind,
        "base_revision": plan.base.revision,
        "base_fingerprint": plan.base.fingerprint("transformer"),
        **_t5_lengths(config.model),
        "encoders": list(plan.method.cached_encoders),
        "base_released_as": VARIANTS.get(str(released_shape(plan.base.config("transformer")))),
        **_encoder_files(plan),
        **_tags(plan),
        **_own_texts(plan),
        **_resolutions(config),
        **_concepts(config),
        **config.model.fewer_bits,
        "instance_prompt": captions[0] if len(captions) == 1 else None,
        "shift": plan.shift,
        "sigma_range": [config.flow.min_sigma, config.flow.max_sigma],
        **({"sampler_noise_offset": config.flow.noise_offset} if config.flow.noise_offset else {}),
        **_input_perturbation(config),
        "dtype": dtype_name(plan.dtype),
        "weights": "raw" if config.ema is None else "ema",
    }
    return {**plan.method.contract(), **contract_of(config), **_overriding(config), **declared(of_the_run)}


def _t5_lengths(model: ModelConfig) -> dict[str, Any]:
    """Return all T5 lengths used in training; empty for a run with a single length."""
    return {"t5_lengths": model.t5_lengths} if len(model.t5_lengths) > 1 else {}


def _encoder_files(plan: Plan) -> dict[str, Any]:
    """Return file name and fingerprint of each text encoder that was loaded from a file of its own."""
    base = plan.base
    encoders = {
        name: {"file": base.encoder_files[name].name, "fingerprint": base.fingerprint(ENCODER_PARTS[name][1])}
        for name in plan.method.cached_encoders
        if name in base.encoder_files
    }
    return {"encoder_files": encoders} if encoders else {}


def _tags(plan: Plan) -> dict[str, Any]:
    """Return the tag frequencies of the captions; empty unless `data.export_tags` is set."""
    if not plan.config.data.export_tags:
        return {}
    return {"tag_frequency": tag_frequency(record.caption for record in plan.records)}


def _own_texts(plan: Plan) -> dict[str, Any]:
    """Return the encoders that read texts of their own in training; empty if all read the same captions."""
    readers = own_readers(plan.records)
    return {"own_texts": readers} if readers else {}


def _overriding(config: Config) -> dict[str, Any]:
    """Return the contract's entries that replace the written value, which may differ between sources."""
    triggers = dict.fromkeys(trigger for concept in concepts_of(config.data) for trigger in concept.triggers)
    return {"trigger": ", ".join(triggers) or None, "resolution": config.data.side}


def _concepts(config: Config) -> dict[str, Any]:
    """Return name and triggers of each concept; empty unless several are told apart."""
    if not are_told_apart(config.data):
        return {}
    concepts = concepts_of(config.data)
    return {"concepts": [{"name": of.name, "trigger": ", ".join(of.triggers) or None} for of in concepts]}


def _resolutions(config: Config) -> dict[str, Any]:
    """Return the sides of all sizes of the training; empty for a single size."""
    sides = config.data.sides
    return {"resolutions": sides} if len(sides) > 1 else {}


def run_identity(plan: Plan, encoded: Encoded | None, world: int) -> dict[str, Any]:
    """Return the facts that a resumed run must share with its checkpoint; without `encoded`, no digests of the data."""
    config = plan.config
    written = identity_of(config, _resolved(plan))
    model, data = written.pop("model"), written.pop("data")
    return {
        **written,
        "method": plan.method.identity(),
        "model": {**model, **({"clip_l_pooled": "unprojected"} if plan.base.ignores_projection else {})},
        "data": {
            "resolution": data["resolution"],
            **(_content(encoded, config.data.balance is not None) if encoded and not plan.shards else {}),
            **(streamed_content(plan) if encoded else {}),
            **data,
            **({"kept_captions": "whole"} if may_drop_kept(config) and not drops_kept_captions(plan) else {}),
        },
        "processes": world,
    }


def _resolved(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return, by config key, the identity's entries that replace the configured value."""
    config = plan.config
    parts = (config.method, config.schedule, config.flow.loss)
    extendable = not any(part.depends_on_length for part in parts)
    return {
        "method": {},  # see `Method.identity`
        "model.base": {"base": plan.base.fingerprint("transformer")},
        "model.dtype": {"dtype": dtype_name(plan.dtype)},
        "model.extra_t5_lengths": _t5_lengths(config.model),
        "model.t5_quantize": _quantized(plan),
        "flow.shift": {"shift": _shift(plan)},
        "flow.input_perturbation": _input_perturbation(config),
        "train.steps": {} if extendable else {"steps": config.train.steps},
    }


def _input_perturbation(config: Config) -> dict[str, float]:
    strength = config.flow.input_perturbation
    return {"input_perturbation": strength} if strength else {}


def _quantized(plan: Plan) -> dict[str, str]:
    forms = plan.config.model.fewer_bits
    in_int8 = "int8" in forms.values() and not began_in_llm_int8(plan)
    return {**forms, **({"int8": "weights"} if in_int8 else {})}


def _content(encoded: Encoded, balanced: bool) -> dict[str, str]:
    captions = [content_of(example) for example in encoded.examples]
    priors = [example.prior.facts() for example in encoded.examples if example.prior]
    masks = [example.mask and asdict(example.mask) for example in encoded.examples]
    return {
        "images": _digest_of_images(encoded, {}),
        "captions": key("captions", captions=captions)[:16],
        "weights": key("weights", weights=[example.weight for example in encoded.examples])[:16],
        **({"prior": key("prior", priors=priors)[:16]} if priors else {}),
        **({"concepts": key("concepts", concepts=[of.concept for of in encoded.examples])[:16]} if balanced else {}),
        **({"masks": key("masks", masks=masks)[:16]} if any(masks) else {}),
    }


def _digest_of_images(encoded: Encoded, renamed: Mapping[str, str]) -> str:
    images = [tuple(renamed.get(one, one) for one in example.images) for example in encoded.examples]
    return key("images", images=images)[:16]


def _shift(plan: Plan) -> float | str:
    if plan.config.flow.shift == "resolution":
        return f"by resolution, {plan.model_shift:g} at 1024 px"
    return plan.shift


_EXPLAINED = {
    "model.clip_l_pooled": "an earlier sd3tune encoded the run's captions with CLIP-L's text_projection, which Stable "
    "Diffusion 3 does not use; they are encoded without it now",
}
"""Messages for identity keys that earlier versions did not write."""

_DIGESTS = {
    "model.base": "weights of the base",
    "method.start_from": "adapter to start from",
    "data.images": "images, sizes, crops, flips and repeats",
    "data.captions": "captions",
    "data.weights": "weights of the sources",
    "data.concepts": "concepts of the images",
    "data.masks": "masks, or loss outside them,",
    "data.shards": "shards, or settings of captions,",
}
"""Descriptions of the identity keys whose values are digests."""


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return `differences`. The meaning of int8 differs only where a form of quantisation does, which has a line."""
    return [line for line in differences(saved, now) if not line.startswith("model.int8:")]


def _as_divided_now(plan: Plan, saved: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Return the saved identity, with the present number of processes if they see the same images at a time.

    Only a run with `train.sharding` may change this number: processes times batch size stays.
    """
    if plan.config.train.sharding == "none" or _images_at_a_time(saved) != _images_at_a_time(now):
        return saved
    train = {**saved["train"], "batch_size": now["train"]["batch_size"]}
    return {**saved, "processes": now["processes"], "train": train}


def _images_at_a_time(identity: Mapping[str, Any]) -> int | None:
    """Return the images in one forward pass of all processes; None for an identity that was edited."""
    train, processes = identity.get("train"), identity.get("processes")
    batch = train.get("batch_size") if isinstance(train, Mapping) else None
    return processes * batch if isinstance(processes, int) and isinstance(batch, int) else None


def check_identity(plan: Plan, identity: Mapping[str, Any], encoded: Encoded) -> None:
    """Raise RunError if `identity` differs from the checkpoint's, with a line per difference."""
    assert plan.start is not None
    saved = _as_divided_now(plan, saved_identity(plan.start), identity)
    lines = [_in_words(line) for line in _differences(saved, identity)]
    earlier = encoded.earlier_keys
    if earlier and saved["data"].get("images") == _digest_of_images(encoded, earlier):
        names = dict.fromkeys(example.name for example in encoded.examples if earlier.keys() & set(example.images))
        lines = [line for line in lines if not line.startswith("data.images:")]
        lines.append(
            "data.images: colour profiles (and the range of 32-bit greys) were ignored in the run and are followed "
            f"now, which changes {', '.join(list(names)[:3])}{', ...' * (len(names) > 3)}"
        )
    _refuse(plan, lines)


def check_finished(plan: Plan, world: int) -> None:
    """Do as `check_identity` for a finished run, without the digests of the data, which may have been deleted."""
    assert plan.start is not None
    now = run_identity(plan, None, world)
    saved = saved_identity(plan.start)
    saved = {**saved, "data": {name: value for name, value in saved["data"].items() if name in now["data"]}}
    saved = _as_divided_now(plan, saved, now)
    lines = _differences(saved, now)
    with contextlib.suppress(ConfigError):  # the run folder's configuration was removed
        before = load_config(plan.run / "config.yaml").config
        lines += differences(compared_when_finished(before), compared_when_finished(plan.config))
    _refuse(plan, [_in_words(line) for line in lines])


def _refuse(plan: Plan, lines: Sequence[str]) -> None:
    if lines:
        raise RunError(
            *(f"--resume: {line}" for line in lines),
            f"{plan.run}: a resumed run keeps what changes its maths; undo this, or start a new run with another name",
        )


def _in_words(line: str) -> str:
    key = line.partition(":")[0]
    if key in _EXPLAINED:
        return f"{key}: {_EXPLAINED[key]}"
    if key == "processes":
        line += "; with train.sharding it may change, if train.batch_size changes so that their product stays"
    return f"{key}: not the same {_DIGESTS[key]} as in the run" if key in _DIGESTS else line


def _counts(plan: Plan) -> dict[str, int]:
    masks = sum(record.mask is not None for record in plan.records)
    return {
        "images": len(plan.records),
        "images_per_epoch": plan.images_per_epoch,
        "captions": len({caption for record in plan.records for caption in record.drawn}),
        **({"masks": masks} if masks else {}),
    }


def start_facts(plan: Plan, world: int) -> dict[str, Any]:
    """Return the content of `run.json` at the start: versions, device, base, data counts and optimizer."""
    used, fallback, gpu = plan.config.optimizer.kind, plan.optimizer_fallback, gpu_of(plan.device)
    return {
        "versions": versions(),
        "seed": plan.config.seed,
        "world_size": world,
        "steps": plan.config.train.total_steps,
        "device": plan.device.type,
        "gpu": gpu.name if gpu else None,
        "dtype": dtype_name(plan.dtype),
        "threads": torch.get_num_threads(),
        "base": {
            "name": plan.base.name,
            "revision": plan.base.revision,
            "fingerprint": plan.base.fingerprint("transformer"),
        },
        **({"shards": len(plan.shards)} if plan.shards else _counts(plan)),
        "held_out_images": len(plan.holdout),
        "class_images": sum(prior.count for prior in plan.priors),
        "modules": len(plan.modules),
        "optimizer": {
            "asked": fallback.asked if fallback else used,
            "used": used,
            "reason": fallback.reason if fallback else None,
        },
    }
