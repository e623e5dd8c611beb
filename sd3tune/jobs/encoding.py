"""From records to examples in the store: what `train` does first and `cache` does alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sd3tune.config import Config
from sd3tune.data.records import sample_indices
from sd3tune.data.store import Store
from sd3tune.encode.captions import encode_captions
from sd3tune.encode.images import encode_images
from sd3tune.jobs.preflight import Plan
from sd3tune.train.batches import Example
from sd3tune.train.loop import Processes

NEGATIVE_PROMPT = ""
"""The unconditional prompt, and a dropped caption: the empty string's encoding, never zeros."""


@dataclass(frozen=True)
class Encoded:
    """The store, and what of it this run uses."""

    store: Store
    examples: list[Example]
    """One per record, repeated as often as an epoch sees it."""
    captions: Mapping[str, Mapping[str, str]]
    """Encoder -> text -> key, preview prompts and the negative prompt included."""
    warnings: list[str]


def store_folder(config: Config) -> Path:
    """`data.cache_dir`, else `$SD3TUNE_CACHE/store`, else `.cache/sd3tune` beside the folder that holds the run."""
    if config.data.cache_dir is not None:
        return Path(config.data.cache_dir)
    if os.environ.get("SD3TUNE_CACHE"):
        return Path(os.environ["SD3TUNE_CACHE"]).expanduser().absolute() / "store"
    return Path(str(config.output_dir)).parent.parent / ".cache" / "sd3tune"


def encode(plan: Plan, processes: Processes, say: Callable[[str], None]) -> Encoded:
    """Encode what is missing, each process its share, one component in memory at a time."""
    config, encoders = plan.config, plan.method.cached_encoders
    store = Store(store_folder(config))
    needs_empty = bool(config.preview.prompts) or config.data.caption_dropout > 0
    more = [*config.preview.prompts, *([NEGATIVE_PROMPT] if needs_empty else [])]
    captions, caption_report = encode_captions(
        plan.base,
        [*(record.caption for record in plan.records), *more],
        store,
        encoders=encoders,
        dtype=plan.dtype,
        device=plan.device,
        max_sequence_length=config.model.max_sequence_length,
        progress=processes.is_main,
        records=plan.records,
        rank=processes.rank,
        world=processes.world,
        say=say,
    )
    processes.wait()
    images, image_report = encode_images(
        plan.base,
        plan.records,
        store,
        buckets=plan.buckets,
        crop_variants=config.data.crop_variants,
        flip=config.data.flip,
        dtype=plan.dtype,
        device=plan.device,
        progress=processes.is_main,
        rank=processes.rank,
        world=processes.world,
        say=say,
    )
    processes.wait()
    store.refresh()
    for line in (*caption_report.lines(), *image_report.lines()):
        say(line)
    once = [
        Example(
            record.image.name,
            image.keys,
            {encoder: captions[encoder][record.caption] for encoder in encoders},
            image.size,
            record.weight,
        )
        for record, image in zip(plan.records, images, strict=True)
    ]
    examples = [once[index] for index in sample_indices(plan.records)]
    return Encoded(store, examples, captions, [*caption_report.warnings, *image_report.warnings])
