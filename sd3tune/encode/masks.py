"""Encode masks into the store: the share of each latent position inside the mask, per crop and flip variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image

from sd3tune.data.ahead import ahead
from sd3tune.data.crops import Crop, cover_size, latent_mask, mask_bytes
from sd3tune.data.images import PREPROCESSING_VERSION
from sd3tune.data.masks import Mask, check_mask_size, read_mask
from sd3tune.data.records import Record
from sd3tune.data.store import Store, key
from sd3tune.encode.inspect import inspect
from sd3tune.encode.manifest import ImageFacts, Manifest
from sd3tune.encode.resources import check_room, is_mine
from sd3tune.errors import DataError


@dataclass(frozen=True)
class _Cut:
    """The mask of one crop."""

    scaled: tuple[int, int]
    """Size of the image that just covers the crop."""
    crop: Crop


def masks_of(
    records: Sequence[Record], facts: Sequence[ImageFacts], manifest: Manifest, progress: bool
) -> list[ImageFacts | None]:
    """Return the facts of each record's mask, None without one, given the images' facts.

    An image without transparency has no alpha channel as its mask. Raises DataError for all masks that cannot be
    decoded or have another shape than their image.
    """
    files = list(dict.fromkeys(mask.image for record in records if (mask := record.mask) and not mask.is_alpha))
    facts_of = dict(zip(files, inspect(files, manifest, progress), strict=True))
    found, problems = list[ImageFacts | None](), list[str]()
    for record, image in zip(records, facts, strict=True):
        mask = record.mask
        if mask is None:
            found.append(None)
        elif mask.is_alpha:
            found.append(image if image.reading and image.reading.transparent else None)
        else:
            found.append(facts_of[mask.image])
            try:
                check_mask_size(mask, facts_of[mask.image].size, record.image, image.size)
            except DataError as error:
                problems += error.problems
    if problems:
        raise DataError(*dict.fromkeys(problems))
    return found


def encode_masks(
    records: Sequence[Record],
    facts: Sequence[ImageFacts],
    crops: Sequence[Sequence[Crop]],
    store: Store,
    manifest: Manifest,
    *,
    progress: bool,
    rank: int,
    world: int,
    say: Callable[[str], None],
) -> list[tuple[str, ...]]:
    """Encode the masks that the store lacks; return the keys of each record's crops, none without a mask.

    Entries are {"mask"}, fp32 [height/8, width/8]. With `world` > 1 each rank encodes its share. Raises DataError for
    all masks that cannot be used, and RunError if the disk lacks space.
    """
    masks = masks_of(records, facts, manifest, progress)
    cuts = [
        [(_key(record.mask, of.digest, cut), cut) for cut in _cuts(image, variants)] if record.mask and of else []
        for record, image, of, variants in zip(records, facts, masks, crops, strict=True)
    ]
    store.check(key for variants in cuts for key, _ in variants)
    missing = {*store.missing(key for variants in cuts for key, _ in variants)}
    jobs: dict[tuple[Mask, str], dict[str, _Cut]] = {}
    for record, of, variants in zip(records, masks, cuts, strict=True):
        lacking = {key: cut for key, cut in variants if key in missing}
        if record.mask and of and lacking:
            jobs.setdefault((record.mask, of.digest), {}).update(lacking)
    if jobs:
        nbytes = sum(mask_bytes(cut.crop.size) for lacking in jobs.values() for cut in lacking.values())
        say(check_room(store.root, "masks", len(missing), nbytes))
    _encode({job: lacking for job, lacking in jobs.items() if is_mine(job[1], rank, world)}, store)
    if rank == 0:
        pairs = ((record.mask, of) for record, of in zip(records, masks, strict=True))
        files = {str(mask): of for mask, of in pairs if mask and of and not mask.is_alpha}
        if files:
            Manifest.add(store.root, images=files)
    return [tuple(key for key, _ in variants) for variants in cuts]


def _cuts(image: ImageFacts, crops: Sequence[Crop]) -> list[_Cut]:
    return [_Cut(cover_size(image.size, crop.size), crop) for crop in crops]


def _key(mask: Mask, digest: str, cut: _Cut) -> str:
    return key(
        "mask",
        mask=digest,
        alpha=mask.is_alpha,
        scaled=cut.scaled,
        size=cut.crop.size,
        box=cut.crop.box,
        flip=cut.crop.flip,
        preprocessing=PREPROCESSING_VERSION,
    )


def _encode(jobs: dict[tuple[Mask, str], dict[str, _Cut]], store: Store) -> None:
    def decode(job: tuple[Mask, str]) -> Image.Image | DataError:
        try:
            mask, digest = read_mask(job[0])
        except DataError as error:
            return error
        return mask if digest == job[1] else DataError(f"{job[0]}: changed while it was being encoded; run again")

    if not jobs:
        return
    problems: list[str] = []
    with store.writer() as writer:
        for job, mask in zip(jobs, ahead(decode, jobs), strict=True):
            if isinstance(mask, DataError):
                problems += mask.problems
                continue
            for key, cut in jobs[job].items():
                writer.put(key, {"mask": latent_mask(mask, cut.scaled, cut.crop)})
    if problems:
        raise DataError(*problems)
