"""`sd3tune infer`: images from adapters and models, with the conditioning that they were trained under."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune.adapter.derived import notes_of
from sd3tune.adapter.file import Adapter, match
from sd3tune.adapter.hub import load_adapter
from sd3tune.data.images import check_header, read_picture, reading_warnings
from sd3tune.errors import ConfigError, RunError
from sd3tune.inference.album import Album, before_and_after
from sd3tune.inference.conditions import Conditions, settle_conditions, settle_memory
from sd3tune.inference.grid import Grid, read_grid
from sd3tune.inference.image_request import Shot, beyond_the_base, conflicts_of, problems_of, seeded
from sd3tune.inference.missing import draw_missing
from sd3tune.inference.prompts_file import Row, read_prompts
from sd3tune.inference.recipes import Recipes
from sd3tune.inference.replay import read_repeat, repeated
from sd3tune.inference.request import Request, check_request, flag_of, parse_lora
from sd3tune.inference.session import Studio, draw
from sd3tune.model.base.hub import nothing_fetched
from sd3tune.model.load.components import empty_transformer, load_scheduler
from sd3tune.reporting import say
from sd3tune.runtime.device import choose_dtype, gpu_of, make_accelerator
from sd3tune.sampling.samplers import SAMPLERS

Asked = tuple[Shot, Callable[[str], str]]
"""A shot, and what its parts are called where they were given."""


def run_infer(request: Request) -> list[Path]:
    """Draw what was asked for: some images with a picture of before and after, a file of prompts, or a grid.

    Returns the files that show it, written now or, but for the first, earlier. Raises UserError. A recipe fetches
    nothing from the Hub unless the request allows it.
    """
    recipe_alone = request.from_picture is not None and not request.allow_download
    with nothing_fetched() if recipe_alone else nullcontext():
        return _run(request)


def _run(request: Request) -> list[Path]:
    repeat = read_repeat(request.from_picture) if request.from_picture else None
    wanted = repeated(request, repeat) if repeat else request
    check_request(wanted)
    rows = read_prompts(wanted.prompts) if wanted.prompts else []
    grid = read_grid(wanted.grid, wanted.loras)
    given = [parse_lora(lora) for lora in [*wanted.loras, *(grid.loras if grid else ())]]
    adapters = [load_adapter(path, transformer_only=wanted.transformer_only) for path, _ in given]
    for line in (line for adapter in adapters for line in notes_of(adapter)):
        say(line)
    studio = _studio(wanted, adapters)
    if repeat is not None:
        if not request.loras:
            repeat.check_adapters(adapters[: len(wanted.loras)])
        repeat.check_base(studio.conditions.base, chosen=request.base is not None or request.config is not None)

    fixed = tuple((number, weight) for number, (_, weight) in enumerate(given[: len(wanted.loras)]))
    conditions = studio.conditions
    usual = {name: getattr(conditions, name) for name in ("size", "steps", "guidance", "noise_offset")}
    common = {**usual, **wanted.of_the_shot, "loras": fixed}
    asked = _asked(rows, common, wanted.num)
    by_row = grid.shots(asked[0][0]) if grid else []
    if grid is not None:
        asked = [(shot, flag_of) for row in by_row for shot in row]
    _check_against_base(asked, studio.conditions, studio.adapters)
    _make_folder(wanted.out)

    album = Album(wanted.out, Recipes(studio))
    shots = [shot for shot, _ in asked]
    if grid is not None:
        return _draw_grid(studio, album, by_row, grid)
    if rows:
        return draw_missing(studio, album, shots)
    return _draw_before_and_after(studio, album, shots, before=wanted.before)


def _studio(request: Request, adapters: Sequence[Adapter]) -> Studio:
    device = make_accelerator().device
    dtype = choose_dtype(request.dtype, gpu_of(device), "--dtype")
    memory = settle_memory(request.memory, adapters)
    return Studio(settle_conditions(request, adapters), adapters, dtype, device, request.batch, memory)


def _asked(rows: Sequence[Row], common: Mapping[str, Any], num: int) -> list[Asked]:
    """`num` shots for each row, or for what they have in `common` alone."""
    if not rows:
        return [(shot, flag_of) for shot in seeded(Shot(**common), num)]
    return [(shot, row.named) for row in rows for shot in seeded(Shot(**{**common, **row.values}), num)]


def _draw_grid(studio: Studio, album: Album, shots: Sequence[Sequence[Shot]], grid: Grid) -> list[Path]:
    """What is missing of the shots by row and column, and one picture of all. Returns the files, that picture last."""
    wide = len(shots[0])
    files = draw_missing(studio, album, [shot for row in shots for shot in row])
    by_row = [files[start : start + wide] for start in range(0, len(files), wide)]
    return [*files, album.add_grid(grid, shots, by_row)]


def _draw_before_and_after(studio: Studio, album: Album, shots: Sequence[Shot], before: bool) -> list[Path]:
    """The shots and, in one picture, the same without adapters. Returns the files, that picture last."""
    bare = []
    if before and studio.adapters:
        bare = [replace(shot, loras=(), noise_offset=studio.conditions.base_noise_offset) for shot in shots]
    images: dict[Shot, Image.Image] = {}
    written = []
    for shot, image in draw(studio, [*shots, *bare], one_by_one=False):
        images[shot] = image
        if shot.loras or not bare:
            written.append(album.add(shot, image))
    if bare:
        sheet = before_and_after([images[shot] for shot in bare], [images[shot] for shot in shots], shots)
        written.append(album.add_sheet(shots[0], sheet, "before-after"))
    return written


def _check_against_base(asked: Sequence[Asked], conditions: Conditions, adapters: Sequence[Adapter]) -> None:
    """What cannot be, and what this base cannot do, before anything large is loaded. Raises UserError."""
    skeleton, schedule = empty_transformer(conditions.base), load_scheduler(conditions.base).config
    problems = [line for shot, named in asked for line in problems_of(shot, named)]
    for shot, named in asked:
        problems += conflicts_of(shot, named) or beyond_the_base(shot, named, skeleton.config)
        if shot.shift is None and schedule.get("use_dynamic_shifting") and not SAMPLERS[shot.sampler].follows_size:
            problems.append(
                f"{named('sampler')} {shot.sampler}: the shift of {conditions.base.label} depends on the size of the "
                "image, which only euler follows; give --shift, such as 3"
            )
    if problems:
        raise ConfigError(*dict.fromkeys(problems))
    for image in {shot.image for shot, _ in asked if shot.image is not None}:
        check_header(image)
        for warning in reading_warnings([(image, read_picture(image).reading)]):
            say(f"warning: {warning}")
    for adapter in adapters:
        match(skeleton, adapter)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: {out} cannot be made: {error.strerror}; choose another folder") from error
