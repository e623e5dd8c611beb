"""The photos that pictures are compared with: of the run, or of a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sd3tune.config.sections.data import DataConfig, FolderSource
from sd3tune.data.images import ImageRef
from sd3tune.data.records import load_records
from sd3tune.errors import ConfigError, DataError
from sd3tune.evaluation.request import EvalRequest
from sd3tune.evaluation.subject import Subject, read_subject
from sd3tune.evaluation.target import Target
from sd3tune.reporting import say
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
            records, holdout = split_records(target.config, load_records(target.config.data))
        except DataError as error:
            if request.photos is None:
                hint = "the run's photos are read again to compare with; give them with --photos DIR"
                raise DataError(*(f"{problem}; {hint}" for problem in error.problems)) from None
            records, holdout = [], []
        captions = [record.caption for record in records]
        training, held_out = [record.image for record in records], [record.image for record in holdout]
    if request.photos is not None:
        source = FolderSource(path=str(request.photos), caption="a photo")
        try:
            training = [record.image for record in load_records(DataConfig(sources=[source]))]
        except DataError as error:
            raise DataError(*(f"--photos: {problem}" for problem in error.problems)) from None
        held_out = ()
    if not training:
        raise ConfigError(f"{request.target}: its photos are not known here; give them with --photos DIR")
    return Photos(_at_most(training), _at_most(held_out), captions)


def find_subject(request: EvalRequest, target: Target, photos: Photos) -> Subject:
    """Return the subject as the run's captions and priors name it, else as an adapter's contract does."""
    if target.config is None:
        single = target.contract.get("instance_prompt")
        return read_subject([single] if single else [], (), target.contract.get("trigger"), request.class_word)
    data = target.config.data
    priors = [prompt for source in data.sources if source.prior for prompt in source.prior.prompts]
    captions = photos.captions or [source.caption for source in data.sources if source.caption]
    return read_subject(captions, priors, data.trigger, request.class_word)


def _at_most(photos: Sequence[ImageRef]) -> Sequence[ImageRef]:
    if len(photos) <= MOST_PHOTOS:
        return photos
    say(f"note: {MOST_PHOTOS} of the {len(photos)} photos are compared with, evenly spaced")
    return [photos[number * len(photos) // MOST_PHOTOS] for number in range(MOST_PHOTOS)]
