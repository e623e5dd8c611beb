"""`sd3tune data mask`: write the missing masks of a folder of photos with a segmentation model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from PIL import Image, ImageEnhance

from sd3tune.data.captions import some
from sd3tune.data.images import read_picture
from sd3tune.errors import DataError, RunError
from sd3tune.files.atomic import new_file, remove_stale
from sd3tune.files.text import flaw
from sd3tune.labels.lines import count, next_commands
from sd3tune.labels.loading import loaded
from sd3tune.labels.photos import Photo, photos_in
from sd3tune.labels.segmenter import LEAST_SIDE, SEGMENTER, Segmenter, load_segmenter
from sd3tune.model.base.pretrained import folder_of, model_source
from sd3tune.reporting import progress_bar, result, say
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.out_of_memory import explain_oom
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sheet_file import check_sheet, write_sheet

_COMMAND = "data mask"
_SHEET_IMAGES, _SHEET_COLUMNS, _SHEET_SIDE = 48, 6, 176
_DIMMED = 0.25
"""Brightness of a photo outside its mask, on the contact sheet."""


@dataclass(frozen=True)
class MaskRequest:
    """What to mask, in which photos."""

    folder: Path
    prompt: str
    """The subject in words, such as "dog"."""
    model: str | None = None
    """Hub id, with or without `@revision`, or a folder; None for the default model."""
    threshold: float = 0.4
    """Probability, between 0 and 1, from which on a place belongs to the subject."""
    recursive: bool = False
    sheet: Path = Path("runs/data-mask.png")
    """The contact sheet to write."""

    def check(self) -> None:
        """Raise RunError for a value that cannot be used."""
        if not self.prompt.strip():
            raise RunError("--prompt: is empty; name the subject, such as dog")
        if wrong := flaw(self.prompt):
            raise RunError(f"--prompt: {wrong}")
        if not 0 < self.threshold < 1:
            raise RunError(f"--threshold {self.threshold:g}: is a probability; give one between 0 and 1, such as 0.4")
        check_sheet(self.sheet, _COMMAND)


@dataclass
class _Written:
    """The outcome of this call."""

    coverage: dict[Photo, float] = field(default_factory=dict)
    """Photo -> share of its pixels inside the mask."""
    empty: list[str] = field(default_factory=list)
    """Photos in which nothing was found, with the highest probability."""
    problems: list[str] = field(default_factory=list)
    """A line for each photo that cannot be read."""


def run_data_mask(request: MaskRequest, dry_run: bool = False) -> None:
    """Write a mask for each photo without one, and a contact sheet; a mask that exists is never overwritten.

    Each file appears complete or not at all, so the same call continues an interrupted one. Raises DataError, after the
    other photos, for photos that cannot be read, and ModelError for a model that cannot be had.
    """
    request.check()
    photos, warnings = photos_in(request.folder, request.recursive)
    missing = [photo for photo in photos if photo.mask is None]
    _check_names(missing)
    source = model_source(request.model) if request.model else SEGMENTER
    for line in _plan(photos, missing, warnings):
        say(line)
    if dry_run:
        say(f"dry run: {source.label} was not loaded, and nothing was written")
        return
    written = _Written()
    if missing:
        folder = folder_of(source, "name a local folder: --model FOLDER")
        device = make_accelerator().device
        with (
            explain_oom("masking", lambda: "close other programs"),
            loaded(source, device, lambda: load_segmenter(source, folder, device)) as segmenter,
        ):
            _write(request, segmenter, missing, written)
    _report(request, photos, written)
    if written.problems:
        raise DataError(*written.problems)


def _check_names(missing: Sequence[Photo]) -> None:
    """Raise DataError for photos that would share a mask."""
    shared = [photo for photo in missing if photo.shares_stem]
    if shared:
        named = some(photo.image.name for photo in shared)
        raise DataError(f"{shared[0].new_mask}: would be the mask of several photos: {named}; rename all but one")


def _plan(photos: Sequence[Photo], missing: Sequence[Photo], warnings: Sequence[str]) -> Iterator[str]:
    """Yield lines on what is there and what will be written."""
    yield from (f"warning: {line}" for line in warnings)
    kept = [photo.image.name for photo in photos if photo.mask is not None]
    if kept:
        yield f"kept      {count(len(kept), 'photo')} with a mask: {some(kept)}"
    named = some(str(photo.new_mask) for photo in missing)
    yield f"to write  {count(len(missing), 'mask')}{f': {named}' if missing else ''}"


def _write(request: MaskRequest, segmenter: Segmenter, missing: Sequence[Photo], written: _Written) -> None:
    """Mask the photos, one at a time."""
    for folder in {photo.path.parent for photo in missing}:
        remove_stale(folder)
    for photo in progress_bar(missing, desc="masking", unit="photo"):
        try:
            picture = read_picture(photo.image, at_least=LEAST_SIDE)
        except DataError as error:
            written.problems += error.problems
            continue
        found = segmenter.find(picture.image, request.prompt, picture.size, request.threshold)
        if found.likeliest < request.threshold:
            written.empty.append(f"{photo.image.name} ({found.likeliest:.2f})")
        elif not photo.new_mask.exists():  # else somebody else wrote it in the meantime
            with new_file(photo.new_mask) as temporary:
                found.mask.save(temporary, format="PNG")
            written.coverage[photo] = found.coverage


def _report(request: MaskRequest, photos: Sequence[Photo], written: _Written) -> None:
    """Write the contact sheet, and print the outcome and the next command."""
    coverage = written.coverage
    if coverage:
        least, most = min(coverage, key=coverage.__getitem__), max(coverage, key=coverage.__getitem__)
        say(
            f"coverage  {coverage[least]:.0%} ({least.image.name}) to {coverage[most]:.0%} ({most.image.name}), "
            f"median {median(coverage.values()):.0%}"
        )
    if written.empty:
        say(
            f"warning: {request.prompt!r} is not in {count(len(written.empty), 'photo')}: {some(written.empty)}; "
            "brackets hold the highest probability; use other words or a lower --threshold, or paint the mask"
        )
    masked = [photo for photo in photos if photo.mask is not None or photo in coverage]
    if masked:
        _write_sheet(request.sheet, masked, coverage)
        say(f"sheet     {request.sheet}")
    kept = sum(photo.mask is not None for photo in photos)
    result(
        f"wrote {count(len(coverage), 'mask')} in {request.folder}, kept {kept}",
        written=len(coverage),
        kept=kept,
        not_found=len(written.empty),
        folder=request.folder,
        sheet=request.sheet,
    )
    say("", "look at the sheet, and correct or delete bad masks; then:")
    say(*next_commands(request.folder, request.recursive))


def _write_sheet(path: Path, masked: Sequence[Photo], coverage: dict[Photo, float]) -> None:
    shown = masked[:: math.ceil(len(masked) / _SHEET_IMAGES)]
    tiles = [
        (_tile(photo), photo.image.name + (f"  {coverage[photo]:.0%}" if photo in coverage else "  (kept)"))
        for photo in shown
    ]
    rows = [tiles[start : start + _SHEET_COLUMNS] for start in range(0, len(tiles), _SHEET_COLUMNS)]
    picture = contact_sheet(
        [[tile for tile, _ in row] for row in rows],
        side=_SHEET_SIDE,
        cells=[[label for _, label in row] for row in rows],
    )
    write_sheet(path, _COMMAND, picture)


def _tile(photo: Photo) -> Image.Image | None:
    """Return a photo that is dimmed outside its mask; None if one of the two cannot be read."""
    try:
        picture = read_picture(photo.image, at_least=_SHEET_SIDE).image
        mask = read_picture(photo.mask or photo.new_mask).image
    except DataError:
        return None
    picture.thumbnail((_SHEET_SIDE, _SHEET_SIDE))
    outside = ImageEnhance.Brightness(picture).enhance(_DIMMED)
    return Image.composite(picture, outside, mask.convert("L").resize(picture.size))
