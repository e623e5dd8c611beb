"""Encode images into the store: mean and standard deviation of the VAE's posterior, per crop and flip variant."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from sd3tune.data.ahead import ahead
from sd3tune.data.buckets import Size, nearest_bucket, size_name
from sd3tune.data.crops import Crop, cover, crops, pixels
from sd3tune.data.images import PREPROCESSING_VERSION, ImageRef, is_smaller, read_image
from sd3tune.data.records import Record
from sd3tune.data.store import Store, key
from sd3tune.encode.inspect import inspect, warnings_about
from sd3tune.encode.manifest import ImageFacts, Manifest
from sd3tune.encode.masks import encode_masks
from sd3tune.encode.report import IMAGE_CHANGED, IMAGE_SETTING_CHANGED, LOST, NEW, EncodeReport, damage_warnings
from sd3tune.encode.resources import check_room, is_mine, release
from sd3tune.errors import DataError, ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.load.components import load_vae, vae_dtype
from sd3tune.model.load.latents import encode_moments
from sd3tune.reporting import progress_bar

NOT_FINITE = (
    "the VAE turns it into NaN or infinity; try model.dtype=fp32, and if that does not help, get the base's VAE again"
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class EncodedImage:
    """One record's image in the store: its cropped (height, width), and a key per variant."""

    size: Size
    keys: tuple[str, ...]
    earlier_keys: tuple[str, ...]
    """The keys of versions that read every image alike; they differ from `keys` if the colour profile now matters."""
    masks: tuple[str, ...] = ()
    """The key of each variant's mask; empty without a mask."""


@dataclass(frozen=True)
class _Job:
    """An image and its variants that the store lacks."""

    image: ImageRef
    digest: str
    target: Size
    cuts: dict[str, Crop]


def encode_images(
    base: Base,
    records: Sequence[Record],
    store: Store,
    *,
    label: str = "images",
    buckets: Sequence[Size],
    crop_variants: int = 1,
    flip: bool = False,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    progress: bool = False,
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = logger.info,
) -> tuple[list[EncodedImage], EncodeReport]:
    """Encode the images and masks that the store lacks; return all in the records' order, and the report.

    An image has a record for each of its sizes. It is cropped to the nearest shape of the record's `sizes`, else of
    `buckets`, (height, width) in pixels. Entries are {"mean", "std"}, fp32 [16, height/8, width/8], and `encode_masks`'
    own. The VAE is loaded only if entries are missing, and then freed. It encodes one image at a time in `dtype`, or in
    fp32 for fp16, where it would overflow. With `world` > 1 each rank encodes its share: wait for all ranks after this
    call, then call `store.refresh()`. `say` receives the size of the entries to write, where `label` names the records.
    Raises DataError for all unreadable images at once, then for all masks, before the VAE is loaded. Raises ModelError,
    and RunError if the disk lacks space.
    """
    dtype = vae_dtype(dtype)
    manifest = Manifest.load(store.root)
    refs = [record.image for record in records]
    distinct = {id(record.image): record for record in records}  # an image has a record for each of its sizes
    found = inspect([record.image for record in distinct.values()], manifest, progress)
    of_image = dict(zip(distinct, found, strict=True))
    facts = [of_image[id(ref)] for ref in refs]
    vae = base.fingerprint("vae")
    tables = [record.sizes or buckets for record in records]
    targets = [nearest_bucket(image.size, table) for image, table in zip(facts, tables, strict=True)]
    crops = list(_crops(facts, targets, crop_variants, flip))
    cuts = [
        [(image_key(vae, dtype, image.digest, image.mark, cut), cut) for cut in variants_of_image]
        for image, variants_of_image in zip(facts, crops, strict=True)
    ]

    damaged = _damaged(refs, cuts, store)
    masks = encode_masks(records, facts, crops, store, manifest, progress=progress, rank=rank, world=world, say=say)
    jobs, reasons = _missing(refs, facts, targets, cuts, manifest, store)
    entries = sum(len(job.cuts) for job in jobs)
    pixels_missing = sum(len(job.cuts) * job.target[0] * job.target[1] for job in jobs)
    nbytes = round(pixels_missing * bytes_per_pixel(base))
    if entries:
        say(check_room(store.root, label, entries, nbytes))

    mine = [job for job in jobs if is_mine(job.digest, rank, world)]
    if mine:
        _encode(base, mine, store, dtype, device, progress)
        release(device)
    if rank == 0:
        Manifest.add(store.root, images={str(ref): image for ref, image in zip(refs, facts, strict=True)})
    variants = crop_variants * (1 + flip)
    sizes = f" ({len(distinct)} pictures in several sizes)" if len(distinct) < len(refs) else ""
    extent = f"{len(records)}{sizes}" + (f" x {variants} variants" if variants > 1 else "")
    read = warnings_about(list(distinct.values()), found)
    warnings = [*damage_warnings(damaged), *read, *_enlarged(refs, facts, targets)]
    report = EncodeReport(label, extent, len(records), reasons, nbytes, warnings)
    return [_encoded(vae, dtype, *one) for one in zip(facts, targets, cuts, masks, strict=True)], report


def _missing(
    refs: Sequence[ImageRef],
    facts: Sequence[ImageFacts],
    targets: Sequence[Size],
    cuts: Sequence[Sequence[tuple[str, Crop]]],
    manifest: Manifest,
    store: Store,
) -> tuple[list[_Job], Counter[str]]:
    """Return the jobs for the variants that the store lacks, and the number of images by reason."""
    jobs: dict[tuple[str, Size], _Job] = {}  # by digest and bucket: copies of a file are encoded once
    reasons: Counter[str] = Counter()
    for ref, image, target, variants in zip(refs, facts, targets, cuts, strict=True):
        lacking = {key: cut for key, cut in variants if key not in store}
        if lacking:
            jobs[image.digest, target] = _Job(ref, image.digest, target, lacking)
            reasons[_reason(ref, image, manifest, store)] += 1
    return list(jobs.values()), reasons


def _damaged(refs: Sequence[ImageRef], cuts: Sequence[Sequence[tuple[str, Crop]]], store: Store) -> list[str]:
    """Return the names of the images with damaged entries."""
    lost = set(store.check(key for variants in cuts for key, _ in variants))
    pairs = zip(refs, cuts, strict=True)
    return [ref.name for ref, variants in pairs if not lost.isdisjoint(key for key, _ in variants)]


def _crops(facts: Sequence[ImageFacts], targets: Sequence[Size], variants: int, flip: bool) -> Iterator[list[Crop]]:
    for image, target in zip(facts, targets, strict=True):
        yield crops(image.size, target, variants, flip, image.digest)


def _encoded(
    vae: str,
    dtype: torch.dtype,
    facts: ImageFacts,
    target: Size,
    cuts: Sequence[tuple[str, Crop]],
    masks: tuple[str, ...],
) -> EncodedImage:
    earlier = (image_key(vae, dtype, facts.digest, "", cut) for _, cut in cuts)
    return EncodedImage(target, tuple(key for key, _ in cuts), tuple(earlier), masks)


def image_key(vae: str, dtype: torch.dtype, digest: str, mark: str, cut: Crop) -> str:
    return key(
        "image",
        image=digest,
        vae=vae,
        dtype=str(dtype),
        size=cut.size,
        box=cut.box,
        flip=cut.flip,
        preprocessing=PREPROCESSING_VERSION,
        **({"reading": mark} if mark else {}),
    )


def _encode(
    base: Base,
    jobs: Sequence[_Job],
    store: Store,
    dtype: torch.dtype,
    device: torch.device | str,
    progress: bool,
) -> None:
    def decode(job: _Job) -> tuple[_Job, Image.Image]:
        image, digest = read_image(job.image)
        if digest != job.digest:
            raise DataError(f"{job.image}: changed while images were being encoded; run again")
        return job, cover(image, job.target)

    total = sum(len(job.cuts) for job in jobs)
    bar = progress_bar(total=total, desc="encoding images", unit="image", disable=not progress)
    with bar, store.writer() as writer:
        vae = load_vae(base, dtype, device)
        for job, image in ahead(decode, jobs):
            for key, cut in job.cuts.items():
                mean, std = encode_moments(vae, pixels(image, cut))
                if not (mean.isfinite().all() and std.isfinite().all()):
                    raise ModelError(f"{job.image}: {NOT_FINITE}")
                writer.put(key, {"mean": mean[0], "std": std[0]})
                bar.update()


def bytes_per_pixel(base: Base) -> float:
    """Return the bytes of an entry (mean and std in fp32) per pixel, from the VAE's configuration alone."""
    config = base.config("vae")
    scale = 2 ** (len(config["block_out_channels"]) - 1)
    return 2 * 4 * config["latent_channels"] / scale**2


def _reason(image: ImageRef, facts: ImageFacts, manifest: Manifest, store: Store) -> str:
    known = manifest.images.get(str(image))
    if known is None:
        return NEW
    if known.digest != facts.digest:
        return IMAGE_CHANGED
    return LOST if store.damaged or not len(store) else IMAGE_SETTING_CHANGED


def _enlarged(refs: Sequence[ImageRef], facts: Sequence[ImageFacts], targets: Sequence[Size]) -> list[str]:
    checked = zip(refs, facts, targets, strict=True)
    small = [(ref.name, target) for ref, image, target in checked if is_smaller(image.size, target)]
    if not small:
        return []
    verb = "image is" if len(small) == 1 else "images are"
    named = ", ".join(f"{name} ({size_name(target)})" for name, target in small[:3]) + ", ..." * (len(small) > 3)
    return [f"{len(small)} {verb} enlarged to fill the crop, which blurs the result: {named}"]
