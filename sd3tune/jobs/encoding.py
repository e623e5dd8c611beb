"""From records to examples in the store: what `train` does first and `cache` does alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sd3tune.config.sections.data import ClassImagesConfig, OwnPredictionConfig
from sd3tune.data.buckets import Size
from sd3tune.data.records import Record, sample_indices
from sd3tune.data.store import Store
from sd3tune.encode.captions import encode_captions
from sd3tune.encode.images import EncodedImage, encode_images
from sd3tune.encode.report import EncodeReport
from sd3tune.jobs.drawing import NEGATIVE_PROMPT, draw_class_images
from sd3tune.jobs.places import store_folder
from sd3tune.jobs.preflight import Plan
from sd3tune.train.examples import ClassImages, Example, OwnPrediction, Prior
from sd3tune.train.loop import Processes


@dataclass(frozen=True)
class Encoded:
    """The store, and what of it this run uses."""

    store: Store
    examples: list[Example]
    """One per record, repeated as often as an epoch sees it."""
    captions: Mapping[str, Mapping[str, str]]
    """Encoder -> text -> key, preview prompts and the negative prompt included."""
    warnings: list[str]


def encode(plan: Plan, processes: Processes, say: Callable[[str], None]) -> Encoded:
    """Encode what is missing, each process its share, one component in memory at a time; draw class images between."""
    store = Store(store_folder(plan.config))
    captions, reports = _encode_captions(plan, store, processes, say)
    draw_class_images(plan, store, captions, processes)
    processes.wait()
    images, report = _encode_images(plan, plan.records, plan.buckets, store, processes, say)
    reports.append(report)
    pools: dict[int, ClassImages] = {}
    for prior in plan.priors:
        found, report = _encode_images(plan, prior.records, prior.sizes, store, processes, say, "class images")
        reports.append(report)
        weight = prior.settings.weight
        pictures = [
            _example(record, image, captions, weight) for record, image in zip(prior.records, found, strict=True)
        ]
        pools[prior.source] = ClassImages(
            prior.source, {size: [of for of in pictures if of.size == size] for size in prior.sizes}
        )
    processes.wait()
    store.refresh()
    for report in reports:
        for line in report.lines():
            say(line)
    sources = plan.config.data.sources
    priors = [_prior(source.prior, pools.get(number), captions) for number, source in enumerate(sources)]
    once = [
        _example(record, image, captions, record.weight, priors[record.source])
        for record, image in zip(plan.records, images, strict=True)
    ]
    examples = [once[index] for index in sample_indices(plan.records)]
    return Encoded(store, examples, captions, [warning for report in reports for warning in report.warnings])


def _encode_captions(
    plan: Plan, store: Store, processes: Processes, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, str]], list[EncodeReport]]:
    """Those of the images and of their classes, the prompts of previews and, where it is needed, the empty one."""
    config = plan.config
    records = [*plan.records, *(record for prior in plan.priors for record in prior.records)]
    kept = [prior.prompt for source in config.data.sources if (prior := source.prior) and prior.weight > 0]
    needs_empty = bool(config.preview.prompts) or config.data.caption_dropout > 0 or bool(plan.priors)
    captions, report = encode_captions(
        plan.base,
        [
            *(record.caption for record in records),
            *kept,
            *config.preview.prompts,
            *([NEGATIVE_PROMPT] if needs_empty else []),
        ],
        store,
        encoders=plan.method.cached_encoders,
        dtype=plan.dtype,
        device=plan.device,
        max_sequence_length=config.model.max_sequence_length,
        progress=processes.is_main,
        records=records,
        rank=processes.rank,
        world=processes.world,
        say=say,
    )
    processes.wait()
    store.refresh()
    return captions, [report]


def _encode_images(
    plan: Plan,
    records: Sequence[Record],
    buckets: Sequence[Size],
    store: Store,
    processes: Processes,
    say: Callable[[str], None],
    what: str = "images",
) -> tuple[list[EncodedImage], EncodeReport]:
    data, own = plan.config.data, what == "images"
    return encode_images(
        plan.base,
        records,
        store,
        what=what,
        buckets=buckets,
        crop_variants=data.crop_variants if own else 1,
        flip=data.flip and own,
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
    weight: float,
    prior: Prior | None = None,
) -> Example:
    keys = {encoder: of[record.caption] for encoder, of in captions.items()}
    return Example(record.image.name, image.keys, keys, image.size, weight, prior)


def _prior(
    settings: ClassImagesConfig | OwnPredictionConfig | None,
    pictures: ClassImages | None,
    captions: Mapping[str, Mapping[str, str]],
) -> Prior | None:
    if settings is None or not settings.weight or pictures:
        return pictures
    return OwnPrediction({encoder: of[settings.prompt] for encoder, of in captions.items()}, settings.weight)
