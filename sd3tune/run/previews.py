"""The previews of a run, read from its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config.run_folder import read_run_file
from sd3tune.files.own_json import is_whole_number, read_object
from sd3tune.publish.card.evaluated import EVAL_FOLDER
from sd3tune.publish.files import ADAPTERS, EMBEDDINGS
from sd3tune.publish.previews import PREVIEW_NAME, SAMPLES, preview_recipe
from sd3tune.run.folder import BEST, BEST_EVALUATED, BEST_FILE, MEASURED, holds_report
from sd3tune.training.checkpoint import list_checkpoints


@dataclass(frozen=True)
class Preview:
    """A picture drawn with the weights of one step."""

    path: Path
    step: int
    number: int
    """Index of the prompt in `preview.prompts`."""
    recipe: Mapping[str, Any]
    """`prompt`, `steps`, `guidance`, `seed`, `weights` (`raw` or `ema`) and, if set, `noise_offset`,
    `negative`, `size` and `slg`."""


def previews_of(run: Path) -> list[Preview]:
    """Return all previews, sorted by step and number. Files without a recipe are ignored."""
    named = ((path, PREVIEW_NAME.fullmatch(path.name)) for path in (run / SAMPLES).glob("step-*.png"))
    found = [
        Preview(path, int(name[1]), int(name[2]), recipe)
        for path, name in named
        if name and (recipe := preview_recipe(path)) is not None
    ]
    return sorted(found, key=lambda preview: (preview.step, preview.number))


def run_of(adapter: Path) -> Path | None:
    """Return the run folder that contains an adapter file; None if there is none."""
    return next((folder for folder in list(adapter.absolute().parents)[:5] if read_run_file(folder)), None)


def step_of(adapter: Path, run: Path) -> int | None:
    """Return the step whose weights an adapter file of the run holds; None for a file that the run did not export.

    Raises OSError, ValueError or LookupError if the run folder is damaged.
    """
    file = adapter.absolute().relative_to(run)
    if file.parts[0] == "checkpoints":
        return int(file.parts[1].removeprefix("step-"))
    if file.parts[:2] == (EVAL_FOLDER, MEASURED):
        return int(file.parts[2].removeprefix("step-"))
    if file.parts[0] == BEST:
        name = next((name for name in (BEST_EVALUATED, BEST_FILE) if (run / BEST / name).exists()), BEST_FILE)
        step = read_object(run / BEST / name)["step"]
        if not is_whole_number(step):
            raise ValueError(f"{BEST}/{name}: step is not a whole number")
        return int(step)
    if file.parts[0] not in (*ADAPTERS, *EMBEDDINGS) or not holds_report(run):
        return None
    return int(list_checkpoints(run)[-1].name.removeprefix("step-"))
