"""The section on training: a table of settings and data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sd3tune.model.base.parts import LABELS
from sd3tune.publish.card.markdown import code, table
from sd3tune.publish.card.trained import Trained

Row = tuple[str, str]
_PRIORS = {"images": "class images", "prediction": "the base's own prediction"}


def training_section(trained: Trained) -> str:
    rows = [*_what(trained), *_data(trained), *_mathematics(trained), *_text(trained), *_machine(trained)]
    return f"## How it was trained\n\n{table(['', ''], rows)}"


def _what(trained: Trained) -> Iterator[Row]:
    contract, ema = trained.contract, trained.config.ema
    revision = f" at {code(contract['base_revision'])}" if contract["base_revision"] else ""
    yield "base model", f"{code(contract['base'])}{revision}"
    if trained.is_adapter:
        yield "rank, alpha", f"{contract['rank']}, {contract['alpha']:g} (folded into the file: alpha = rank there)"
        if "export_dtype" in contract:
            yield "file", f"{contract['export_dtype']}{_rounding(trained)}"
        if trained.trained_encoders:
            yield "trained text encoders", "; ".join(map(_encoder, trained.trained_encoders.items()))
    elif not trained.is_embedding:
        yield "trained", f"the whole transformer, in the file as {contract['export_dtype']}"
    if trained.learned is not None:
        yield from _token(trained.learned)
    raw = "" if trained.step else f"; as trained in `{trained.folder}_raw`"
    yield "weights", "as trained" if ema is None else f"exponential moving average, decay {ema.decay:g}{raw}"


def _token(learned: Mapping[str, Any]) -> Iterator[Row]:
    vectors = f"{_count(learned['vectors'], 'vector')} for {code(learned['token'])} in CLIP-L and CLIP-G"
    yield "trained", f"{vectors}, from the words {code(learned['init'])}"
    if "until" in learned:
        frozen = f", and frozen after {learned['until']:.0%} of the steps" if learned["until"] < 1 else ""
        yield "vectors", f"trained at learning rate {learned['lr']:g}{frozen}"
    yield "T5 reads", f"{code(learned['t5_caption'])} in its place"


def _rounding(trained: Trained) -> str:
    error = (trained.report or {}).get("rounding_error")
    return "" if error is None else f"; the rounding changes one denoising step by {100 * error:.2g} %"


def _encoder(trained: tuple[str, Mapping[str, Any]]) -> str:
    name, settings = trained
    return f"{LABELS[name]}, rank {settings['rank']}, {settings['targets']}, learning rate {settings['lr']:g}"


def _data(trained: Trained) -> Iterator[Row]:
    contract, facts, train = trained.contract, trained.run_facts, trained.config.train
    if "captions" in facts:  # runs of earlier versions lack it
        captions = _count(facts["captions"], "caption") if facts["captions"] == 1 else f"{facts['captions']} captions"
        yield "data", f"{_count(facts['images'], 'image')} with {captions}{_repeated(trained)}"
        if facts["held_out_images"]:
            yield "held out", f"{_count(facts['held_out_images'], 'image')}, not trained on"
        if facts["class_images"]:
            yield "class images", str(facts["class_images"])
    if "shards" in facts:
        yield "data", f"a stream of {_count(facts['shards'], 'shard')}"
    yield from _concepts(trained)
    yield from _priors(trained)
    sides = ", ".join(map(str, contract.get("resolutions", [contract["resolution"]])))
    yield "resolution", f"{sides} px" + (", aspect buckets" if contract["buckets"] else ", squares")
    world = facts.get("world_size", 1)
    processes = f" x {world} processes" if world > 1 else ""
    early = f" of {train.total_steps}, stopped early" if facts.get("stopped_early") else ""
    yield "steps", f"{trained.steps}{early}, batch {train.batch_size} x {train.gradient_accumulation}{processes}"
    if "images_per_epoch" in facts:
        seen = trained.steps * train.batch_size * train.gradient_accumulation * world
        yield "images seen", f"{seen:,}, {_epochs(seen / facts['images_per_epoch'])}"


def _repeated(trained: Trained) -> str:
    images, per_epoch = trained.run_facts["images"], trained.run_facts["images_per_epoch"]
    return "" if images == per_epoch else f", {per_epoch} in an epoch with their repeats"


def _epochs(count: float) -> str:
    return f"{count:.3g} epoch{'s' * (count != 1)}"


def _concepts(trained: Trained) -> Iterator[Row]:
    data, concepts = trained.config.data, trained.contract.get("concepts", [])
    if concepts:
        drawn = {None: "each image equally often", "equal": "each concept equally often"}
        described = drawn.get(data.balance) if not isinstance(data.balance, dict) else "in shares"
        yield "concepts", f"{', '.join(code(one['name']) for one in concepts)}; drawn {described}"


def _priors(trained: Trained) -> Iterator[Row]:
    used = [source.prior for source in trained.config.data.sources if source.prior and source.prior.weight > 0]
    described = [
        f"{_PRIORS[prior.kind]} of {', '.join(map(code, prior.prompts))}, weight {prior.weight:g}" for prior in used
    ]
    if described:
        yield "prior preservation", "; ".join(dict.fromkeys(described))


def _mathematics(trained: Trained) -> Iterator[Row]:
    config, contract = trained.config, trained.contract
    sigma, optimizer = contract["timesteps"], config.optimizer
    yield "optimizer", f"{optimizer.kind}, learning rate {optimizer.lr:g}, {config.schedule.kind}"
    yield (
        "sigma",
        f"{_variant(sigma)}, shift {contract['shift']:g}, weighting {contract['weighting']['kind']}",
    )
    yield "dropout", f"caption {contract['caption_dropout']:g}, text encoder {contract['encoder_dropout']:g}"


def _variant(settings: Mapping[str, Any]) -> str:
    """Return e.g. `logit_normal (mean 0, std 1)`."""
    shown = ", ".join(
        f"{key} {_shown(value)}" for key, value in settings.items() if key != "kind" and value is not None
    )
    return f"{settings['kind']} ({shown})" if shown else str(settings["kind"])


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return " and ".join(map(_shown, value))
    if isinstance(value, Mapping):
        return _variant(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(trained: Trained) -> Iterator[Row]:
    files = trained.contract.get("encoder_files", {})
    lengths = ", ".join(map(str, trained.t5_lengths))
    yield "T5 tokens", lengths + ("" if trained.uses_t5 else ", T5 not used")
    if files:
        yield "text encoders", ", ".join(f"{name} from {code(used['file'])}" for name, used in files.items())


def _machine(trained: Trained) -> Iterator[Row]:
    contract, facts = trained.contract, trained.run_facts
    others = "" if contract["dtype"] == "fp32" else "; trained parameters and optimizer in fp32"
    rounded = f", the base's blocks in {contract['quantize']}" if "quantize" in contract else ""
    yield "precision", f"{contract['dtype']}{rounded}{others}"
    yield "seed", str(contract["seed"])
    if "device" in facts:
        yield "device", facts.get("gpu") or facts["device"].upper()
    seconds = facts.get("timings", {}).get("train_s")
    if seconds is not None:
        last = ", since it was last resumed" if facts.get("resumes") else ""
        yield "time", f"{_duration(seconds)} of training{last}"
    known = {"sd3tune": contract["sd3tune_version"], **facts.get("versions", {})}
    named = [
        f"{name} {known[name]}" for name in ("sd3tune", "torch", "diffusers", "transformers", "peft") if name in known
    ]
    yield "versions", ", ".join(named)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} seconds"
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes < 120 else f"{minutes // 60} hours {minutes % 60} minutes"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
