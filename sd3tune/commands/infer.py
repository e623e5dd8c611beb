"""`sd3tune infer`: draw images with adapters or models, using the inference settings stored in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from PIL import Image

from sd3tune.errors import RunError
from sd3tune.inference.grid import Grid
from sd3tune.inference.image_folder import ImageFolder, before_and_after, draw_missing
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.learned import check_tokens, without_unused_tokens
from sd3tune.inference.prepare import PreparedJob, download_policy, prepare
from sd3tune.inference.recipes import Recipes
from sd3tune.inference.session import draw


def run_infer(job: InferenceJob) -> list[Path]:
    """Draw the images of a job into its folder: a grid, a prompt file's images, or images with a before/after picture.

    Returns the image files. Grids and prompt files skip existing images, whose files are included. Raises UserError.
    """
    with download_policy(job):
        prepared = prepare(job)
        check_tokens(prepared.requests, prepared.session)
        out = prepared.job.out
        _make_folder(out)
        folder = ImageFolder(out, Recipes(prepared.session))
        if prepared.grid is not None:
            return _draw_grid(prepared, folder, prepared.grid)
        if prepared.job.prompts:
            return draw_missing(prepared.session, folder, prepared.requests)
        return _draw_before_and_after(prepared, folder)


def _draw_grid(prepared: PreparedJob, folder: ImageFolder, grid: Grid) -> list[Path]:
    """Draw the missing images and one grid of all images. Returns the files, the grid last."""
    wide = len(prepared.rows[0])
    files = draw_missing(prepared.session, folder, prepared.requests)
    by_row = [files[start : start + wide] for start in range(0, len(files), wide)]
    return [*files, folder.add_grid(grid, prepared.rows, by_row)]


def _draw_before_and_after(prepared: PreparedJob, folder: ImageFolder) -> list[Path]:
    """Draw the images, and again without adapters for a before/after picture. Returns the files, that picture last."""
    session, requests = prepared.session, prepared.requests
    bare = []
    if prepared.job.before and session.adapters:
        offset = session.conditions.base_noise_offset
        bare = [replace(request, loras=(), noise_offset=offset) for request in requests]
        bare = [without_unused_tokens(request, session) for request in bare]
    images: dict[ImageRequest, Image.Image] = {}
    written = []
    for request, image in draw(session, [*requests, *bare], one_by_one=False):
        images[request] = image
        if request.loras or not bare:
            written.append(folder.add(request, image))
    if bare:
        sheet = before_and_after([images[request] for request in bare], [images[one] for one in requests], requests)
        written.append(folder.add_sheet(requests[0], sheet, "before-after"))
    return written


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: {out} cannot be made: {error.strerror}; choose another folder") from error
