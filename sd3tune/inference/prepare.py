"""Turn a job into a session and its requests, with every check made before anything large is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.adapter.attach import match
from sd3tune.adapter.derived import notes_of
from sd3tune.adapter.embedding import Embedding
from sd3tune.adapter.file import Adapter
from sd3tune.adapter.hub import load_adapter, load_embedding
from sd3tune.adapter.text_encoders import match_text
from sd3tune.data.images import check_header, read_picture, reading_warnings
from sd3tune.errors import ConfigError
from sd3tune.files.text import weighted_words
from sd3tune.inference.checks import Named, check_job, conflicts_of, flag_of, problems_of, unsupported_by_base
from sd3tune.inference.conditions import Conditions, settle_conditions, settle_memory
from sd3tune.inference.from_recipe import fill_from_recipe, read_source
from sd3tune.inference.grid import Grid, read_grid
from sd3tune.inference.image_request import PROMPT_OF, ImageRequest, seeded
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.learned import check_embeddings, own_embeddings, without_unused_tokens
from sd3tune.inference.lora_argument import parse_lora
from sd3tune.inference.prompts_file import PromptLine, read_prompts
from sd3tune.inference.session import InferenceSession
from sd3tune.model.base.hub import no_downloads
from sd3tune.model.base.parts import ENCODER_OF, LABELS
from sd3tune.model.load.components import empty_transformer, load_scheduler
from sd3tune.reporting import say
from sd3tune.runtime.device import choose_dtype, gpu_of, make_accelerator
from sd3tune.sampling.samplers import SAMPLERS

NamedRequest = tuple[ImageRequest, Named]


@dataclass(frozen=True)
class PreparedJob:
    """A checked job, ready to draw."""

    job: InferenceJob
    """The job, filled in from the repeated recipe if there is one."""
    session: InferenceSession
    rows: Sequence[Sequence[ImageRequest]]
    """The images to draw: by row and column of a grid, otherwise in one row."""
    grid: Grid | None

    @property
    def requests(self) -> list[ImageRequest]:
        """The images to draw, row by row."""
        return [request for row in self.rows for request in row]


def download_policy(job: InferenceJob) -> AbstractContextManager[None]:
    """Return the context in which a job is prepared and drawn.

    With a recipe, it prevents downloads from the Hub unless the job allows them.
    """
    recipe_alone = job.from_picture is not None and not job.allow_download
    return no_downloads() if recipe_alone else nullcontext()


def prepare(asked: InferenceJob) -> PreparedJob:
    """Read recipe, prompts, grid and adapters, and check all of it against the base. Raises UserError."""
    source = read_source(asked.from_picture) if asked.from_picture else None
    job = fill_from_recipe(asked, source) if source else asked
    check_job(job)
    lines = read_prompts(job.prompts) if job.prompts else []
    grid = read_grid(job.grid, job.loras)
    weighted = [parse_lora(lora) for lora in [*job.loras, *(grid.loras if grid else ())]]
    adapters = [load_adapter(path, transformer_only=job.transformer_only) for path, _ in weighted]
    for line in (line for adapter in adapters for line in notes_of(adapter)):
        say(line)
    session = _open_session(job, adapters, [load_embedding(Path(path)) for path in job.embeddings])
    if source is not None:
        if not asked.loras:
            source.check_adapters(adapters[: len(job.loras)])
        if not asked.embeddings:
            source.check_embeddings(session.embeddings)
        source.check_base(session.conditions.base, chosen=asked.base is not None or asked.config is not None)

    fixed = tuple((number, weight) for number, (_, weight) in enumerate(weighted[: len(job.loras)]))
    defaults = {name: getattr(session.conditions, name) for name in ("size", "steps", "guidance", "noise_offset")}
    common = {**defaults, **job.given, "loras": fixed}
    named = _named_requests(lines, common, job.num)
    rows = [[request for request, _ in named]]
    if grid is not None:
        rows = [[without_unused_tokens(one, session) for one in row] for row in grid.requests(named[0][0])]
        named = [(request, flag_of) for row in rows for request in row]
    _check_against_base(named, session.conditions, adapters)
    return PreparedJob(job, session, rows, grid)


def _open_session(job: InferenceJob, adapters: Sequence[Adapter], embeddings: Sequence[Embedding]) -> InferenceSession:
    device = make_accelerator().device
    dtype = choose_dtype(job.dtype, gpu_of(device), "--dtype")
    stating = [*adapters, *(Adapter(one.path, {}, {}, dict(one.contract)) for one in embeddings)]
    memory = settle_memory(job.memory, stating)
    _check_form(adapters, memory.quantize)
    conditions = settle_conditions(job, stating)
    own = own_embeddings(adapters, embeddings)
    check_embeddings([*embeddings, *own.values()], conditions.base)
    return InferenceSession(conditions, adapters, dtype, device, job.batch, memory, embeddings, own)


def _named_requests(lines: Sequence[PromptLine], common: Mapping[str, Any], num: int) -> list[NamedRequest]:
    """Return `num` requests for each line, or for the common fields if there are no lines."""
    if not lines:
        return [(request, flag_of) for request in seeded(ImageRequest(**common), num)]
    return [
        (request, line.named) for line in lines for request in seeded(ImageRequest(**{**common, **line.values}), num)
    ]


def _check_against_base(named: Sequence[NamedRequest], conditions: Conditions, adapters: Sequence[Adapter]) -> None:
    """Raise UserError for values that are invalid or not supported by this base or its adapters."""
    skeleton, schedule = empty_transformer(conditions.base), load_scheduler(conditions.base).config
    problems = [line for request, name in named for line in problems_of(request, name)]
    for request, name in named:
        problems += conflicts_of(request, name) or unsupported_by_base(request, name, skeleton.config)
        sampler = request.sampler
        if request.shift is None and schedule.get("use_dynamic_shifting") and not SAMPLERS[sampler].follows_size:
            problems.append(
                f"{name('sampler')} {sampler}: the shift of {conditions.base.label} depends on the size of the "
                "image, which only euler follows; give --shift, such as 3"
            )
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    _note_texts([request for request, _ in named], adapters)
    files = {file for request, _ in named for file in (request.image, request.mask) if file is not None}
    for file in files:
        check_header(file)
        for warning in reading_warnings([(file, read_picture(file).reading)]):
            say(f"warning: {warning}")
    for image, mask in {(request.image, request.mask) for request, _ in named}:
        if image is not None and mask is not None:
            _check_shapes(image, mask)
    for adapter in adapters:
        match(skeleton, adapter)
        match_text(conditions.base, adapter)
        adapted = [ENCODER_OF[part] for part in adapter.text_parts]
        unused = [LABELS[name] for name in adapted if name not in conditions.encoders]
        if unused:
            say(f"warning: {adapter.label} also adapts {', '.join(unused)}, which does not read the prompt here")


def _check_shapes(image: Path, mask: Path) -> None:
    """Raise ConfigError if a mask has another aspect ratio than its picture, as both are scaled and cut alike."""
    (height, width), (mask_height, mask_width) = (read_picture(file).size for file in (image, mask))
    if height * mask_width != width * mask_height:
        raise ConfigError(
            f"--mask {mask}: is {mask_width} x {mask_height} px and {image} is {width} x {height}; draw the mask on a "
            "copy of the picture"
        )


def _check_form(adapters: Sequence[Adapter], form: str | None) -> None:
    """Raise ConfigError if PEFT cannot compute an adapter on a base in this form."""
    packed = [adapter for adapter in adapters if form == "nf4" and not adapter.by_lora_layers]
    if packed:
        raise ConfigError(
            f"--quantize nf4: {packed[0].label} is a {packed[0].kind}, whose change needs a base with whole rows; take "
            "--quantize int8 or none"
        )


def _note_texts(requests: Sequence[ImageRequest], adapters: Sequence[Adapter]) -> None:
    """Say if a prompt has weights such as `(dog:1.3)`, or lacks a text that an adapter's encoder had in training."""
    texts = (
        getattr(request, name) or "" for request in requests for name in ("prompt", "negative", *PROMPT_OF.values())
    )
    found = next(filter(None, map(weighted_words, texts)), None)
    if found:
        say(f"note: prompt weights such as {found!r} are read as plain text; leave them out")
    for adapter in adapters:
        own = {"clip": ("clip_l", "clip_g"), "t5": ("t5",)}
        fields = [PROMPT_OF[encoder] for reader in adapter.contract.get("own_texts", []) for encoder in own[reader]]
        lacking = [flag_of(name) for name in fields if all(getattr(request, name) is None for request in requests)]
        if lacking:
            say(
                f"note: {adapter.label} was trained with texts of single encoders; {', '.join(lacking)} can give them, "
                "else all read the prompt"
            )
