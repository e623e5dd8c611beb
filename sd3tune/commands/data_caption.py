"""`sd3tune data caption`: write the missing captions of a folder of photos with a vision-language model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sd3tune.config.sections.model import ModelConfig
from sd3tune.data.captions import read_sidecar, some
from sd3tune.data.images import read_picture
from sd3tune.errors import DataError, ModelError, RunError
from sd3tune.files.atomic import remove_stale, write_text
from sd3tune.files.text import flaw
from sd3tune.labels.captioner import CAPTIONER, LONGEST_SIDE, Captioner, load_captioner
from sd3tune.labels.lines import count, next_commands
from sd3tune.labels.loading import loaded
from sd3tune.labels.photos import Photo, photos_in
from sd3tune.labels.wording import caption_of, instruction
from sd3tune.model.base.pretrained import folder_of, model_source
from sd3tune.model.base.resolve import local_base
from sd3tune.model.load.components import load_tokenizer
from sd3tune.model.load.text import count_tokens
from sd3tune.reporting import progress_bar, result, say
from sd3tune.runtime.device import choose_dtype, gpu_of, make_accelerator
from sd3tune.runtime.out_of_memory import explain_oom

_CLIP_TOKENS = 77


@dataclass(frozen=True)
class CaptionRequest:
    """What to write, for which photos."""

    folder: Path
    model: str | None = None
    """Hub id, with or without `@revision`, or a folder; None for the default model."""
    trigger: str | None = None
    """Word that names the subject, put first."""
    subject: str | None = None
    """Class of the subject, such as "dog", put behind the trigger."""
    prompt: str | None = None
    """Instruction to the model, in place of the default."""
    recursive: bool = False
    out: Path | None = None
    """Folder for the caption files; None writes them beside the photos."""
    base: str = ModelConfig().base
    """The base whose CLIP counts the tokens of the captions."""

    def check(self) -> None:
        """Raise RunError for a text that no tokenizer reads."""
        for option in ("trigger", "subject", "prompt"):
            if wrong := flaw(getattr(self, option) or ""):
                raise RunError(f"--{option}: {wrong}")

    def target(self, photo: Photo) -> Path:
        """Return the caption file to write for a photo."""
        beside = photo.new_caption_file
        return beside if self.out is None else self.out / beside.relative_to(self.folder)

    def lacks_caption(self, photo: Photo) -> bool:
        return not (photo.has_caption if self.out is None else self.target(photo).exists())


@dataclass
class _Written:
    """The outcome of this call."""

    captions: list[str] = field(default_factory=list)
    undescribed: list[str] = field(default_factory=list)
    """Photos of which the model gave no description."""
    problems: list[str] = field(default_factory=list)
    """A line for each photo that cannot be read."""


def run_data_caption(request: CaptionRequest, dry_run: bool = False) -> None:
    """Write a caption file for each photo without a caption; a file that exists is never overwritten.

    Each file appears complete or not at all, so the same call continues an interrupted one. Raises DataError, after the
    other photos, for photos that cannot be read, and ModelError for a model that cannot be had.
    """
    request.check()
    photos, warnings = photos_in(request.folder, request.recursive)
    missing = [photo for photo in photos if request.lacks_caption(photo)]
    source = model_source(request.model) if request.model else CAPTIONER
    for line in _plan(request, photos, missing, warnings):
        say(line)
    if dry_run:
        say(f"dry run: {source.label} was not loaded, and nothing was written")
        return
    written = _Written()
    if missing:
        folder = folder_of(source, "name a local folder: --model FOLDER")
        device = make_accelerator().device
        dtype = choose_dtype("auto", gpu_of(device))
        with (
            explain_oom("captioning", lambda: "close other programs, or name a smaller model with --model"),
            loaded(source, device, lambda: load_captioner(source, folder, device, dtype)) as captioner,
        ):
            _write(request, captioner, missing, written)
    _report(request, written, len(photos) - len(missing))
    if written.problems:
        raise DataError(*written.problems)


def _plan(
    request: CaptionRequest, photos: Sequence[Photo], missing: Sequence[Photo], warnings: Sequence[str]
) -> Iterator[str]:
    """Yield lines on what is there and what will be written."""
    yield from (f"warning: {line}" for line in warnings)
    if request.out is None:
        yield from (f"warning: {line}" for line in _unreadable(photos))
    kept = [photo.image.name for photo in photos if not request.lacks_caption(photo)]
    if kept:
        yield f"kept      {count(len(kept), 'photo')} with a caption: {some(kept)}"
    named = some(str(request.target(photo)) for photo in missing)
    yield f"to write  {count(len(missing), 'caption file')}{f': {named}' if missing else ''}"


def _unreadable(photos: Sequence[Photo]) -> Iterator[str]:
    """Yield a line for each caption file that training would refuse, such as an empty one."""
    for photo in photos:
        try:
            if photo.caption_file is not None:
                read_sidecar(photo.caption_file, photo.path)
        except DataError as error:
            yield from error.problems


def _write(request: CaptionRequest, captioner: Captioner, missing: Sequence[Photo], written: _Written) -> None:
    """Caption the photos, one at a time."""
    asked = request.prompt or instruction(request.subject)
    targets = {photo: request.target(photo) for photo in missing}
    for folder in {target.parent for target in targets.values()}:
        remove_stale(folder)
    for photo, target in progress_bar(targets.items(), desc="captioning", unit="photo"):
        try:
            picture = read_picture(photo.image, at_least=LONGEST_SIDE).image
        except DataError as error:
            written.problems += error.problems
            continue
        answer = captioner.describe(picture, asked)
        caption = caption_of(answer.text, answer.complete, request.trigger, request.subject)
        if caption is None:
            written.undescribed.append(photo.image.name)
        elif not target.exists():  # else somebody else wrote it in the meantime
            write_text(target, caption + "\n")
            written.captions.append(caption)


def _report(request: CaptionRequest, written: _Written, kept: int) -> None:
    """Print the outcome, and the next command."""
    for line in _tokens(request, written.captions):
        say(line)
    if written.undescribed:
        say(
            f"warning: no description of {count(len(written.undescribed), 'photo')}: {some(written.undescribed)}; "
            "write the captions yourself, or ask in other words with --prompt"
        )
    if written.captions:
        say(f"first     {written.captions[0]}")
    place = request.out or request.folder
    result(
        f"wrote {count(len(written.captions), 'caption')} in {place}, kept {kept}",
        written=len(written.captions),
        kept=kept,
        undescribed=len(written.undescribed),
        folder=place,
    )
    if request.out is None:
        say("", "read and correct them; then:", *next_commands(request.folder, request.recursive))
    else:
        say("", f"read and correct them; training reads them beside the photos, in {request.folder}")


def _tokens(request: CaptionRequest, captions: Sequence[str]) -> Iterator[str]:
    """Yield lines on the numbers of CLIP's tokens."""
    if not captions:
        return
    try:
        base = local_base(ModelConfig(base=request.base))
        tokenizer = None if base is None else load_tokenizer(base, "clip_l")
    except ModelError as error:
        yield from (f"warning: tokens were not counted: {problem}" for problem in error.problems)
        return
    if tokenizer is None:
        yield f"tokens    not counted: the tokenizers of {request.base} are not on this machine yet"
        return
    counts = [count_tokens(tokenizer, caption) for caption in captions]
    yield f"tokens    CLIP: at most {max(counts)} of {_CLIP_TOKENS}"
    beyond = sum(count > _CLIP_TOKENS for count in counts)
    if beyond:
        yield (
            f"warning: {count(beyond, 'caption')} beyond {_CLIP_TOKENS} CLIP tokens: CLIP does not read the rest, "
            "and T5 does; shorten them, or leave them"
        )
