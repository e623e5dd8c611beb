"""Previews: sampling during training with the weights as exported, equal to `infer`. They do not affect training."""

from __future__ import annotations

import io
import json
import time
from contextlib import AbstractContextManager
from pathlib import Path

from PIL import Image

from sd3tune.encode.resources import release
from sd3tune.files.png_recipe import RECIPE_KEY, save_png
from sd3tune.publish.previews import SAMPLES, SHEET
from sd3tune.reporting import say, show_picture
from sd3tune.run.callbacks.base import RunCallback, Setup
from sd3tune.run.drawing import draw_prompts, wanted_preview
from sd3tune.run.encoding import Encoded
from sd3tune.run.preflight import Plan
from sd3tune.runtime.out_of_memory import is_out_of_memory
from sd3tune.runtime.processes import Processes
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sampler import fault_of
from sd3tune.tracking.trackers import Trackers
from sd3tune.training.loop import View

BASE = "base"
_SHOWN = 6
"""Pictures of a step that a terminal shows."""


class Previews(RunCallback):
    """A training callback that draws one image per prompt.

    It runs before the first step, every `preview.every` steps and after the last. The base's images are drawn once.
    The main process draws; in lockstep all do, and it alone saves.
    """

    timing = "preview_s"

    def __init__(self, plan: Plan, encoded: Encoded, processes: Processes, trackers: Trackers) -> None:
        super().__init__()
        self.plan, self.encoded, self.processes, self.trackers = plan, encoded, processes, trackers
        self.settings = plan.config.preview
        self.pictures = self.settings.pictures
        self.folder = plan.run / SAMPLES
        self._drawn: set[int] = set()
        self._sent: set[Path] = set()
        for name in self._names():
            self._send(name)

    @classmethod
    def make(cls, setup: Setup) -> Previews | None:
        if not setup.plan.config.preview.prompts:
            return None
        return cls(setup.plan, setup.encoded, setup.processes, setup.trackers)

    def __call__(self, view: View) -> None:
        due = view.step % self.settings.every == 0 or view.last
        draws = self.processes.is_main or self.processes.lockstep
        if not due or not draws or view.step in self._drawn:
            return
        self._drawn.add(view.step)
        started, name = time.monotonic(), f"step-{view.step:06d}"
        try:
            self._draw_missing(BASE, view, view.method.disabled(view.transformer))
            self._draw_missing(name, view, view.method.as_exported(view.transformer, view.weights))
            if self.processes.is_main:
                self._write_sheet()
                self._show(name)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.processes.lockstep:
                raise
            release(self.plan.device)
            warning = f"step {view.step}: no preview, out of memory"
            self.warnings.append(warning)
            say(f"warning: {warning}; training continues")
        self.seconds += time.monotonic() - started
        self._send(name)

    def _draw_missing(self, name: str, view: View, weights: AbstractContextManager[None]) -> None:
        """Draw and save one image per prompt, unless an earlier attempt did."""
        paths = [self._path(name, number) for number in range(len(self.pictures))]
        drawn = all(_has_recipe(path, self._recipe(number)) for number, path in enumerate(paths))
        if self.processes.exchange(drawn)[0] if self.processes.lockstep else drawn:
            return
        with weights:
            images = draw_prompts(
                self.plan,
                self.encoded.store,
                self.encoded.captions,
                view.transformer,
                [wanted_preview(one, self.settings.seed + number) for number, one in enumerate(self.pictures)],
                base=name == BASE,
                label=f"preview, {name}",
            )
        for number, (path, image) in enumerate(zip(paths, images, strict=True)) if self.processes.is_main else ():
            save_png(image, path, self._recipe(number))
            if fault := fault_of(image):
                say(f"warning: {path}: {fault}")

    def _show(self, name: str) -> None:
        """Show a step's new pictures in the terminal."""
        paths = [self._path(name, number) for number in range(len(self.pictures))]

        def strip() -> bytes:
            file = io.BytesIO()
            contact_sheet([[Image.open(path) for path in paths[:_SHOWN]]]).save(file, format="PNG")
            return file.getvalue()

        more = len(paths) - 1
        show_picture(f"preview   {paths[0]}" + f" and {more} more" * (more > 0), strip)

    def _path(self, name: str, number: int) -> Path:
        return self.folder / f"{name}-{number}.png"

    def _names(self) -> list[str]:
        """Return the names of the steps that have pictures, such as `step-000100`."""
        return sorted({path.name.rpartition("-")[0] for path in self.folder.glob("step-*.png")})

    def _send(self, name: str) -> None:
        """Send a step's new pictures to the trackers."""
        for number, prompt in enumerate(self.settings.texts):
            path = self._path(name, number)
            if path not in self._sent and _has_recipe(path, self._recipe(number)):
                self._sent.add(path)
                self.trackers.image(_step(name), f"preview/{number}", path, prompt)

    def _write_sheet(self) -> None:
        """Write the contact sheet: a row per prompt, a column for the base and one per step.

        A prompt that was added later has no pictures in earlier columns. The sheet is rewritten if it is out of date:
        an earlier attempt may have ended before writing it.
        """
        columns = {BASE: BASE} | {name: f"step {_step(name)}" for name in self._names()}
        paths = [
            [path if _has_recipe(path := self._path(name, number), self._recipe(number)) else None for name in columns]
            for number in range(len(self.pictures))
        ]
        recipe = json.dumps([[path and path.name for path in row] for row in paths] + self.settings.texts)
        if _has_recipe(self.folder / SHEET, recipe):
            return
        images = [[Image.open(path) if path else None for path in row] for row in paths]
        sheet = contact_sheet(images, columns=list(columns.values()), rows=self.settings.texts)
        save_png(sheet, self.folder / SHEET, recipe)

    def _recipe(self, number: int) -> str:
        """Return the JSON recipe of a picture, stored in the file to recognise pictures of other settings."""
        settings, offset = self.settings, self.plan.config.flow.noise_offset
        return json.dumps(
            {
                **self.pictures[number].recipe,
                "steps": settings.steps,
                "guidance": settings.guidance,
                "seed": settings.seed + number,
                "weights": "raw" if self.plan.config.ema is None else "ema",
                **({"noise_offset": offset} if offset else {}),
            }
        )


def _has_recipe(path: Path, recipe: str) -> bool:
    """Return whether the picture exists and has this recipe."""
    try:
        with Image.open(path) as image:
            return bool(image.info.get(RECIPE_KEY) == recipe)
    except OSError:
        return False


def _step(name: str) -> int:
    return int(name.removeprefix("step-"))
