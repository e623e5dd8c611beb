"""Prior preservation: its prompts, and for class images those found per source and the missing ones to draw."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from sd3tune.config import Config
from sd3tune.config.sections.data import DataConfig, FolderSource
from sd3tune.config.sections.priors import ClassImagesConfig
from sd3tune.data.buckets import Size, size_name
from sd3tune.data.images import is_smaller
from sd3tune.data.records import Record, load_records
from sd3tune.data.seeds import derive
from sd3tune.data.sources.folder import images_in
from sd3tune.data.store import key
from sd3tune.errors import ConfigError, DataError
from sd3tune.model.base.base import Base
from sd3tune.run.buckets import bucket_of
from sd3tune.run.places import class_image_folder

_DRAWN = re.compile(r"class-[0-9a-f]{8}-\d+x\d+-\d{4,}\.png")


@dataclass(frozen=True)
class Drawn:
    """A class image drawn by the base, or still to be drawn."""

    path: Path
    prompt: str
    size: Size
    seed: int


@dataclass(frozen=True)
class PlannedPrior:
    """The class images of a source."""

    source: int
    settings: ClassImagesConfig
    sizes: Sequence[Size]
    """The buckets of the source's images."""
    own: Sequence[Record]
    """The user's own class images, found in the folder, in each of the source's sizes."""
    drawn: Sequence[Drawn]

    @property
    def records(self) -> list[Record]:
        drawn = (Record(of.path, of.prompt, 1, self.source, sizes=(of.size,)) for of in self.drawn)
        return [*self.own, *drawn]

    @property
    def count(self) -> int:
        """Number of class images."""
        return len({id(record.image) for record in self.own}) + len(self.drawn)

    @property
    def missing(self) -> list[Drawn]:
        return [drawn for drawn in self.drawn if not drawn.path.exists()]

    def describe(self) -> str:
        missing = len(self.missing)
        to_draw = f", {missing} of them to be drawn first" if missing else ""
        return f"prior     {self.count} class images, {describe_prompts(self.settings.prompts)}{to_draw}"


def describe_prompts(prompts: Sequence[str]) -> str:
    """Return the prompts in words: `'a dog'`, or `'a dog', 'a puppy', 'a dog at sea' and 9 more prompts`."""
    shown = ", ".join(repr(prompt) for prompt in prompts[:3])
    more = len(prompts) - 3
    return shown if more < 1 else f"{shown} and {more} more prompt{'s' * (more > 1)}"


def with_captions(config: Config, records: Sequence[Record]) -> Config:
    """Return the configuration with the captions that `prior.captions_without` asks for among the prior's prompts.

    Captions without the name are left out, as they are trained on. Raises ConfigError if no caption has it.
    """
    sources = list(config.data.sources)
    for number, prior in config.data.own_predictions.items():
        if prior.captions_without is None:
            continue
        texts = (caption.text for one in records if one.source == number for caption in one.drawn)
        found = [rest for text in texts if (rest := _without(text, prior.captions_without))]
        if not found:
            raise ConfigError(
                f"data.sources.{number}.prior.captions_without: no caption of the source has "
                f"{prior.captions_without!r}; write the subject's name as the captions do, or remove the key"
            )
        prompts = list(dict.fromkeys([*prior.prompts, *found]))
        sources[number] = sources[number].model_copy(update={"prior": prior.model_copy(update={"prompt": prompts})})
    return config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})


def _without(caption: str, name: str) -> str | None:
    """Return the caption without a name, such as `a dog at sea` for `sks, a dog at sea`; None if it lacks the name."""
    rest, count = re.subn(rf"(?<!\w){re.escape(name)}(?!\w)", "", caption, flags=re.IGNORECASE)
    return re.sub(r"\s+", " ", re.sub(r"\s*,(\s*,)*", ",", rest)).strip(" ,") if count else None


def plan_priors(
    config: Config,
    records: Sequence[Record],
    buckets: Sequence[Size],
    base: Base,
    warn: Callable[[str], None] = lambda line: None,
) -> list[PlannedPrior]:
    """Return the class images of every source that uses them. Raises DataError with every problem.

    `records` has a record for each image and size.
    """
    planned, problems = [], list[str]()
    for number, source in enumerate(config.data.sources):
        settings = source.prior.class_images if source.prior else None
        cut = [(one.sizes, bucket_of(one, buckets)) for one in records if settings and one.source == number]
        if settings is None or not cut:
            continue
        try:
            planned.append(_plan(config, number, settings, cut, base, warn))
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    return planned


def _plan(
    config: Config,
    number: int,
    settings: ClassImagesConfig,
    cut: Sequence[tuple[tuple[Size, ...], Size]],
    base: Base,
    warn: Callable[[str], None],
) -> PlannedPrior:
    """Plan the class images of source `number`; `cut` has `Record.sizes` and the bucket of each of its images."""
    shapes = Counter(size for _, size in cut)
    folder = Path(settings.path) if settings.path else class_image_folder(config)
    own = _images_not_drawn(folder, settings.prompts[0], number, warn) if settings.path else []
    own = _in_sizes_of(cut, own, config.data.enlarges)
    found = Counter(bucket_of(record, list(shapes)) for record in own)
    wanted = {size: wanted - found[size] for size, wanted in shares(shapes, settings.images).items()}
    drawn = _images_to_draw(config, settings, base, folder, wanted)
    lacking = [size for size in shapes if not found[size] and not any(of.size == size for of in drawn)]
    if lacking:
        raise DataError(
            f"data.sources.{number}.prior: {folder} has no class image for the shape {size_name(lacking[0])}, in which "
            "the source has images; add one, or set prior.images so that the base draws some"
        )
    return PlannedPrior(number, settings, list(shapes), own, drawn)


def _in_sizes_of(cut: Sequence[tuple[tuple[Size, ...], Size]], own: Sequence[Record], enlarges: bool) -> list[Record]:
    """Return a record for each of the user's class images and each of the source's sizes that it is large enough for.

    With a single size, return them as they are.
    """
    in_use: dict[tuple[Size, ...], dict[Size, None]] = {}
    for table, size in cut:
        in_use.setdefault(table, {})[size] = None
    if len(in_use) <= 1:
        return list(own)
    records = [replace(record, sizes=tuple(sizes)) for record in own for sizes in in_use.values()]
    return [of for of in records if enlarges or not is_smaller(of.upright_size, bucket_of(of, of.sizes))]


def shares(shapes: Mapping[Size, int], total: int) -> dict[Size, int]:
    """Divide `total` in proportion to the counts, by largest remainders, at least one each unless `total` is 0."""
    if not total:
        return dict.fromkeys(shapes, 0)
    exact = {size: Fraction(total * count, sum(shapes.values())) for size, count in shapes.items()}
    found = {size: int(share) for size, share in exact.items()}
    by_remainder = sorted(exact, key=lambda size: exact[size] - found[size], reverse=True)
    for size in by_remainder[: total - sum(found.values())]:
        found[size] += 1
    return {size: max(1, share) for size, share in found.items()}


def _images_not_drawn(folder: Path, prompt: str, number: int, warn: Callable[[str], None]) -> list[Record]:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"data.sources.{number}.prior.path: {folder} is a file; name a folder")
    if not folder.is_dir() or not any(images_in(folder)):
        return []
    records = load_records(DataConfig(sources=[FolderSource(path=str(folder), caption=prompt, masks="off")]), warn=warn)
    return [record for record in records if not _DRAWN.fullmatch(record.image.name)]


def _images_to_draw(
    config: Config, settings: ClassImagesConfig, base: Base, folder: Path, wanted: Mapping[Size, int]
) -> list[Drawn]:
    """Return the wanted number of images for each size, cycling through the prompts.

    Each pair of prompt and size has its own numbering.
    """
    turns, drawn = itertools.cycle(settings.prompts), list[Drawn]()
    recipes = {prompt: _recipe(config, settings, prompt, base) for prompt in settings.prompts}
    for size, count in wanted.items():
        numbers: Counter[str] = Counter()
        for prompt in itertools.islice(turns, max(0, count)):
            index = numbers[prompt]
            numbers[prompt] += 1
            path = folder / f"class-{recipes[prompt]}-{size_name(size)}-{index:04d}.png"
            drawn.append(Drawn(path, prompt, size, derive(0, "class image", prompt, size_name(size), index)))
    return drawn


def _recipe(config: Config, settings: ClassImagesConfig, prompt: str, base: Base) -> str:
    """Return a digest for the names of drawn images, so that a change of prompt, base or settings draws new ones."""
    model = config.model
    return key(
        "class image",
        prompt=prompt,
        steps=settings.steps,
        guidance=settings.guidance,
        base=str(base.path) if base.kind in ("folder", "file") else base.name,
        revision=base.revision,
        dtype=model.dtype,
        t5=model.max_sequence_length if model.t5 else 0,
        **({"quantize": model.quantize} if model.quantize != "none" else {}),
        **({"clip_l_pooled": "unprojected"} if base.ignores_projection else {}),
        **({"noise_offset": base.noise_offset} if base.noise_offset else {}),
    )[:8]
