"""The photos that pictures are compared with: of the run, or of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sd3tune.config import Config
from sd3tune.config.sections.data import FolderSource
from sd3tune.data.images import ImageRef, open_image
from sd3tune.data.records import load_records
from sd3tune.data.sources.folder import list_folder
from sd3tune.errors import ConfigError, DataError
from sd3tune.evaluation.request import EvalRequest
from sd3tune.evaluation.target import Target
from sd3tune.measures.prompts import evenly
from sd3tune.measures.subject import Subject, read_subject
from sd3tune.reporting import progress_bar, say
from sd3tune.run.evaluated import subject_of
from sd3tune.run.preflight import split_records

MOST_PHOTOS = 1000
"""Photos of each kind; of more, evenly spaced ones are used."""


@dataclass(frozen=True)
class Photos:
    """The photos of an evaluation."""

    training: Sequence[ImageRef]
    held_out: Sequence[ImageRef] = ()
    captions: Sequence[str] = field(default=())
    """The captions of a run's training photos; empty for a folder."""


def find_photos(request: EvalRequest, target: Target) -> Photos:
    """Return the photos of `--photos`, else of the run. Raises UserError if there are none, or if they are missing."""
    captions: Sequence[str] = ()
    training: Sequence[ImageRef] = ()
    held_out: Sequence[ImageRef] = ()
    if target.config is not None and (request.photos is None or target.weights):
        try:
            records, holdout = split_records(target.config, load_records(target.config.data, target.config.seed))
        except DataError as error:
            if request.photos is None:
                hint = "the run's photos are read again to compare with; give them with --photos DIR"
                raise DataError(*(f"{problem}; {hint}" for problem in error.problems)) from None
            records, holdout = [], []
        captions = [record.caption for record in records] or _captions_beside(request.photos, target.config)
        training, held_out = [record.image for record in records], [record.image for record in holdout]
    if request.photos is not None:
        training, held_out = images_of(request.photos, "--photos"), ()
    if not training:
        raise ConfigError(f"{request.target}: its photos are not known here; give them with --photos DIR")
    photos = Photos(_at_most(training), _at_most(held_out), captions)
    for photo in progress_bar([*photos.training, *photos.held_out], desc="checking photos", unit="image", delay=2):
        open_image(photo)  # they are measured last, which is too late for a damaged one
    return photos


def _captions_beside(photos: Path | None, config: Config) -> Sequence[str]:
    """Return the captions of the given photos, read as the run's one folder says; empty without captions there."""
    if photos is None or [source.kind for source in config.data.sources] != ["folder"]:
        return ()
    source = config.data.sources[0].model_copy(update={"path": str(photos)})
    try:
        records = load_records(config.data.model_copy(update={"sources": [source]}), config.seed)
    except DataError:
        return ()
    return [record.caption for record in records]


def images_of(folder: Path, flag: str) -> Sequence[ImageRef]:
    """Return the images of a folder that an option names. Raises DataError if there are none."""
    try:
        return [image for image, _ in list_folder(FolderSource(path=str(folder))).images]
    except DataError as error:
        problems = (problem.replace("; check data.sources", "") for problem in error.problems)
        raise DataError(*(f"{flag}: {problem}" for problem in problems)) from None


def find_subject(request: EvalRequest, target: Target, photos: Photos) -> Subject:
    """Return the subject as the run's configuration and captions name it, else as an adapter's contract does."""
    if target.config is None:
        single = target.contract.get("instance_prompt")
        return read_subject([single] if single else [], (), target.contract.get("trigger"), request.class_word)
    learned = target.config.method.learned_token
    of_token = None if learned is None else learned.class_words
    return subject_of(target.config.data, photos.captions, request.class_word or of_token)


def _at_most(photos: Sequence[ImageRef]) -> Sequence[ImageRef]:
    if len(photos) <= MOST_PHOTOS:
        return photos
    say(f"note: {MOST_PHOTOS} of the {len(photos)} photos are compared with, evenly spaced")
    return evenly(photos, MOST_PHOTOS)
