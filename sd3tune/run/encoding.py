"""Encoding of captions and images into the store: the first stage of `train`, and all of `cache`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sd3tune.config import Config
from sd3tune.config.sections.data import SourceConfig
from sd3tune.data.buckets import Size
from sd3tune.data.colour import Reading
from sd3tune.data.concepts import concept_numbers
from sd3tune.data.headers import Headers
from sd3tune.data.records import Record, sample_indices
from sd3tune.data.store import Store, key
from sd3tune.data.written import Caption
from sd3tune.encode.captions import LLM_INT8, caption_keys, cut_off, encode_captions, texts_read_by
from sd3tune.encode.images import EncodedImage, encode_images
from sd3tune.encode.inspect import facts_of, raise_if_unreadable, warnings_about
from sd3tune.encode.manifest import ImageFacts, Manifest
from sd3tune.encode.masks import masks_of
from sd3tune.encode.report import EncodeReport
from sd3tune.errors import DataError
from sd3tune.measures.prompts import Prompts
from sd3tune.model.load.components import load_tokenizer
from sd3tune.model.load.text import TOKENS, count_tokens
from sd3tune.run.drawing import NEGATIVE_PROMPT, draw_class_images
from sd3tune.run.earlier import began_in_llm_int8
from sd3tune.run.machines import processes_sharing
from sd3tune.run.places import store_folder
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes
from sd3tune.training.batches import T5Lengths
from sd3tune.training.examples import ClassImages, Example, MaskedVariants, OwnPrediction, Prior


@dataclass(frozen=True)
class Encoded:
    """The store, and the entries that a run uses."""

    store: Store
    examples: list[Example]
    """One per record of `Plan.sized`, times its repeats in an epoch."""
    captions: Mapping[str, Mapping[str, str]]
    """Encoder -> text -> key, including the prompts of previews and `eval`, and the negative prompt."""
    holdout: list[Example]
    """Examples for the held-out loss; none is trained on."""
    warnings: list[str]
    earlier_keys: Mapping[str, str]
    """Image key -> its key in versions that ignored colour profiles, for the images whose key changed."""
    t5_lengths: T5Lengths = ()
    """For each trained T5 length, ascending: key in `captions` -> key at that length. Empty for a single length."""


def encode(plan: Plan, processes: Processes, say: Callable[[str], None]) -> Encoded:
    """Encode the missing captions, draw missing class images, then encode the missing images.

    The processes divide the work, and each has one component in memory at a time. Machines without a shared store
    encode everything for themselves.
    """
    store = Store(store_folder(plan.config))
    drawn = {image.path.parent for prior in plan.priors for image in prior.drawn}
    processes = processes_sharing([store.root, *sorted(drawn)], processes, plan.device)
    captions, t5_lengths, report = _encode_captions(plan, store, processes, say)
    reports = [report]
    earlier: dict[str, str] = {}
    draw_class_images(plan, store, captions, processes)
    processes.wait()

    def examples_of(
        label: str, records: Sequence[Record], buckets: Sequence[Size], varied: bool = False
    ) -> list[Example]:
        images, report = _encode_images(plan, label, records, buckets, store, processes, say, varied)
        reports.append(report)
        for image in images:
            earlier.update((now, then) for now, then in zip(image.keys, image.earlier_keys, strict=True) if now != then)
        sources = plan.config.data.sources
        return [
            _example(record, image, captions, sources[record.source], trained=varied)
            for record, image in zip(records, images, strict=True)
        ]

    once = examples_of("images", plan.sized, plan.buckets, varied=True) if plan.sized else []
    pictures = [examples_of("class images", prior.records, prior.sizes) for prior in plan.priors]
    holdout = examples_of("held-out images", plan.holdout, plan.buckets) if plan.holdout else []
    processes.wait()
    store.refresh()
    for report in reports:
        for line in report.lines():
            say(line)

    priors, concepts = _priors(plan, pictures, captions), concept_numbers(plan.config.data)
    once = [
        replace(example, weight=record.weight, prior=priors.get(record.source), concept=concepts[record.source])
        for record, example in zip(plan.sized, once, strict=True)
    ]
    examples = [once[index] for index in sample_indices(plan.sized)]
    known = _holdout_overlap(holdout, examples)
    for warning in known:
        say(f"warning: {warning}")
    warnings = [warning for report in reports for warning in report.warnings]
    return Encoded(store, examples, captions, holdout, [*plan.warnings, *warnings, *known], earlier, t5_lengths)


def check_pictures(plan: Plan, progress: bool) -> list[str]:
    """Decode the images of the run, and return warnings about them. Raises DataError.

    Images without a mask are decoded once, while their files stay as they are.
    """
    priors = [record for prior in plan.priors for record in prior.records]
    every = [*plan.records, *plan.holdout, *priors]  # missing class images are drawn later
    there = [record for record in every if not isinstance(record.image, Path) or record.image.exists()]
    store = store_folder(plan.config)
    manifest, headers = Manifest.load(store), Headers(store)
    keys = [None if record.mask else headers.key_of(record.image) for record in there]
    left = [number for number, of in enumerate(keys) if not headers.is_decoded(of)]
    records, facts, errors = list[Record](), list[ImageFacts](), list[DataError]()
    found = facts_of([there[number].image for number in left], manifest, progress)
    for number, image in zip(left, found, strict=True):
        record = there[number]
        if isinstance(image, DataError):
            errors.append(image)
        elif record.mask is None and image.reading == Reading():
            headers.add_decoded(keys[number])
        else:
            records.append(record)
            facts.append(image)
    headers.save()
    raise_if_unreadable(errors)
    masks_of(records, facts, manifest, progress)
    return warnings_about(records, facts)


def captions_to_encode(records: Iterable[Record], others: Iterable[Record]) -> list[Caption]:
    """Return all captions of the training images, and the first caption of each class image and held-out image."""
    return [*(caption for record in records for caption in record.drawn), *(record.first for record in others)]


def prompts_to_encode(config: Config, drawing: bool, evaluated: Prompts | None = None) -> list[str]:
    """Return class prompts, and the prompts of previews and of `eval` and, if needed, the empty prompt.

    `drawing` is True if the run has class images.
    """
    priors = [prior for source in config.data.sources if (prior := source.prior) and prior.weight > 0]
    measured = [prompt.text for prompt in (*evaluated.scored, *evaluated.of_class)] if evaluated else []
    needs_empty = bool(config.preview.prompts or measured) or config.data.caption_dropout > 0 or drawing
    return [
        *(prompt for prior in priors for prompt in prior.prompts),
        *(text for one in config.preview.pictures for text in (one.prompt, one.negative) if text),
        *measured,
        *([NEGATIVE_PROMPT] if needs_empty else []),
    ]


def _encode_captions(
    plan: Plan, store: Store, processes: Processes, say: Callable[[str], None]
) -> tuple[Mapping[str, Mapping[str, str]], T5Lengths, EncodeReport]:
    config, model = plan.config, plan.config.model
    others = [*plan.holdout, *(record for prior in plan.priors for record in prior.records)]
    prompts = prompts_to_encode(config, bool(plan.priors), plan.evaluated)
    written = captions_to_encode(plan.records, others)
    stored = plan.method.stored_text
    keys, report = encode_captions(
        plan.base,
        map(stored, prompts),
        store,
        captions=[caption.map(stored) for caption in written],
        encoders=plan.method.cached_encoders,
        dtype=plan.dtype,
        device=plan.device,
        max_sequence_length=model.max_sequence_length,
        extra_t5_lengths=model.extra_t5_lengths,
        t5_form=model.t5_quantize,
        t5_form_name=_t5_form_name(plan),
        t5_device="cpu" if config.model.t5_device == "cpu" else None,
        progress=processes.is_main,
        records=[*plan.records, *others],
        rank=processes.rank,
        world=processes.world,
        say=say,
    )
    processes.wait()
    store.refresh()
    captions: dict[str, Mapping[str, str]] = {
        encoder: {text: of[stored(text)] for text in texts_read_by(encoder, prompts, written)}
        for encoder, of in keys.items()
    }
    for encoder in plan.method.trained_encoders:
        captions[encoder], warnings = _noted(plan, store, encoder, captions[encoder])
        for warning in warnings:
            say(f"warning: {warning}")
    return captions, _t5_lengths(plan, keys), report


def _noted(plan: Plan, store: Store, encoder: str, keys: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Add the tokens of every text to its entry of a trained encoder. Return text -> key, and warnings."""
    tokenizer, method = load_tokenizer(plan.base, encoder), plan.method
    most = tokenizer.model_max_length
    found, lost = {}, dict[str, int]()
    for text, of in keys.items():
        found[text] = of if method.stored_text(text) == text else key("learned", text=text, of=of)
        store.note(found[text], of, {TOKENS: method.tokens(tokenizer, text)})
        beyond = count_tokens(tokenizer, method.written(text)) - most if method.written(text) != text else 0
        if beyond > 0:  # the length of all other texts is known from their encoding
            lost[text] = beyond
    return found, cut_off({f"{encoder} reads {most} tokens": lost})


def _t5_form_name(plan: Plan) -> str | None:
    return LLM_INT8 if began_in_llm_int8(plan) else None


def _t5_lengths(plan: Plan, captions: Mapping[str, Mapping[str, str]]) -> T5Lengths:
    model = plan.config.model
    if len(model.t5_lengths) == 1:
        return ()
    own = captions["t5"]
    keys_at = functools.partial(
        caption_keys, plan.base, own, dtype=plan.dtype, t5_form=model.t5_quantize, t5_form_name=_t5_form_name(plan)
    )
    found = [keys_at(encoders=["t5"], max_sequence_length=length)["t5"] for length in model.t5_lengths]
    return [{own[text]: key for text, key in of.items()} for of in found]


def _encode_images(
    plan: Plan,
    label: str,
    records: Sequence[Record],
    buckets: Sequence[Size],
    store: Store,
    processes: Processes,
    say: Callable[[str], None],
    varied: bool = False,
) -> tuple[list[EncodedImage], EncodeReport]:
    """Encode one group of images. `varied` ones, the training images, get crop variants and flips."""
    data = plan.config.data
    return encode_images(
        plan.base,
        records,
        store,
        label=label,
        buckets=buckets,
        crop_variants=data.crop_variants if varied else 1,
        flip=data.flip and varied,
        dtype=plan.dtype,
        device=plan.device,
        progress=processes.is_main,
        rank=processes.rank,
        world=processes.world,
        say=say,
    )


def _example(
    record: Record,
    image: EncodedImage,
    captions: Mapping[str, Mapping[str, str]],
    source: SourceConfig,
    trained: bool,
) -> Example:
    """Return a record's example. `trained` ones draw from all captions, others have the first one."""

    def keys_of(caption: Caption) -> dict[str, str]:
        return {encoder: of[caption.read_by(encoder)] for encoder, of in captions.items()}

    drawn = [keys_of(caption) for caption in (record.drawn if trained else [record.first])]
    choices = tuple(drawn) if len(drawn) > 1 else ()
    mask = MaskedVariants(image.masks, source.outside_weight, source.outside_target == "base") if image.masks else None
    return Example(record.image.name, image.keys, drawn[0], image.size, choices=choices, mask=mask)


def _keys_of(text: str, captions: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    return {encoder: of[text] for encoder, of in captions.items()}


def _holdout_overlap(holdout: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    trained = {key for example in examples for key in example.images}
    names = [example.name for example in holdout if trained & set(example.images)]
    if not names:
        return []
    some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return [f"{len(names)} of the held-out images are also trained on, so their loss is misleading: {some}"]


def _priors(
    plan: Plan, pictures: Sequence[Sequence[Example]], captions: Mapping[str, Mapping[str, str]]
) -> dict[int, Prior]:
    """Return source number -> prior. `pictures` has the class images of each of the plan's priors."""
    priors: dict[int, Prior] = {
        number: OwnPrediction([_keys_of(prompt, captions) for prompt in own.prompts], own.weight, own.drift_limit)
        for number, own in plan.config.data.own_predictions.items()
    }
    for prior, examples in zip(plan.priors, pictures, strict=True):
        weighted = [replace(example, weight=prior.settings.weight) for example in examples]
        pools = {size: [example for example in weighted if example.size == size] for size in prior.sizes}
        priors[prior.source] = ClassImages(prior.source, pools)
    return priors
