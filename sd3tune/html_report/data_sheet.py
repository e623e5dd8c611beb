"""The data sheet of a run: photos, captions, buckets and masks, as they lie on this machine now."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sd3tune.config import Config
from sd3tune.data.buckets import size_name
from sd3tune.data.images import file_of
from sd3tune.data.masks import read_mask
from sd3tune.data.records import Record, load_records
from sd3tune.errors import UserError
from sd3tune.html_report.pictures import THUMBNAIL, Album, Embedded
from sd3tune.html_report.read import RunFiles
from sd3tune.run.buckets import bucket_of, bucket_tables, buckets_in

MOST_PHOTOS, MOST_MASKS = 24, 200
"""Photos that a page shows, and masks that are measured."""


@dataclass(frozen=True)
class Photo:
    """A training photo and what the model reads about it."""

    name: str
    captions: Sequence[str]
    picture: Embedded | None


@dataclass
class DataSheet:
    """What a run was trained on."""

    rows: list[tuple[str, str]]
    """From `run.json`, as counted when the run began."""
    buckets: list[tuple[str, int]] = field(default_factory=list)
    """Size in pixels, and number of photos that are cropped to it."""
    coverage: str = ""
    """The share of the photos inside their masks; empty without masks."""
    photos: list[Photo] = field(default_factory=list)
    more: int = 0
    """Number of photos that are not shown."""
    problem: str = ""
    """Why the photos themselves cannot be looked at."""


_COUNTED = {"images": "photos", "images_per_epoch": "photos per epoch, with repeats", "captions": "different captions",
            "held_out_images": "held out", "class_images": "class images", "masks": "photos with masks"}  # fmt: skip


def data_sheet(run: RunFiles, album: Album, photos: bool = True) -> DataSheet:
    """Return the data sheet. Without `photos`, no picture is shown, and no name and caption of one."""
    sheet = DataSheet([(title, str(run.facts[name])) for name, title in _COUNTED.items() if run.facts.get(name)])
    if run.config is None:
        return sheet
    if any(source.kind != "folder" for source in run.config.data.sources):
        sheet.problem = "The photos of datasets are not read for a report."
        return sheet
    try:
        records = load_records(run.config.data, run.config.seed)
        _look(sheet, run.config, records)
    except UserError as error:
        sheet.problem = f"The photos cannot be read any more: {error.problems[0]}"
        return sheet
    if photos:
        shown = records[:MOST_PHOTOS]
        sheet.photos = [_photo(record, album) for record in shown]
        sheet.more = len(records) - len(shown)
    return sheet


def _look(sheet: DataSheet, config: Config, records: Sequence[Record]) -> None:
    sizes = buckets_in(bucket_tables(config, None))
    counts = Counter(size_name(bucket_of(record, sizes)) for record in records)
    sheet.buckets = counts.most_common()
    masks = [record.mask for record in records if record.mask]
    if masks:
        shares = [float(np.asarray(read_mask(mask)[0]).mean()) / 255 for mask in masks[:MOST_MASKS]]
        some = f", the first {MOST_MASKS} measured" if len(masks) > MOST_MASKS else ""
        sheet.coverage = (
            f"{len(masks)} of {len(records)} photos have masks{some}, which cover {min(shares):.0%} to "
            f"{max(shares):.0%} of them, {sum(shares) / len(shares):.0%} on average."
        )


def _photo(record: Record, album: Album) -> Photo:
    file = file_of(record.image)
    picture = album.add(file, THUMBNAIL) if file else None
    return Photo(record.image.name, [caption.text for caption in record.drawn], picture)
