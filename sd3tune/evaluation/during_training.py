"""Evaluations during training: few pictures, drawn and measured with the weights as exported."""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from sd3tune.config.sections.outputs import EvalConfig
from sd3tune.data.store import key
from sd3tune.encode.resources import release
from sd3tune.errors import DataError, MeasureUnavailable
from sd3tune.evaluation.lines import CURVES, Line, best_of, describe, measured_line, without_a_better_one
from sd3tune.evaluation.measuring import SUBJECT, measure
from sd3tune.evaluation.photos import Photos
from sd3tune.evaluation.pictures import BASE_ROW, OF_CLASS, SCORED, Picture
from sd3tune.files.atomic import new_folder, write_json, write_text
from sd3tune.files.png_recipe import read_recipe, save_png
from sd3tune.measures.encoders import EncoderSpec, encoders_for, loaded
from sd3tune.measures.prompts import Prompts, evenly
from sd3tune.publish.card.evaluated import EVAL_FOLDER
from sd3tune.publish.files import ADAPTERS
from sd3tune.reporting import say
from sd3tune.run.callbacks.base import RunCallback, Setup
from sd3tune.run.drawing import Wanted, draw_prompts
from sd3tune.run.folder import (
    BEST,
    BEST_EVALUATED,
    EVALUATIONS_FILE,
    MEASURED,
    MEASURED_PICTURES,
    read_evaluations,
)
from sd3tune.runtime.out_of_memory import is_out_of_memory
from sd3tune.training.loop import View

MOST_PHOTOS = 100
"""Photos that pictures are compared with; of more, evenly spaced ones are used, as training waits."""


class Evaluations(RunCallback):
    """A training callback that draws prompts and class prompts, measures them, and keeps the measured adapter.

    It runs every `eval.every` steps and after the last, on the main process. Each measurement is a line of `eval.jsonl`
    (see `lines.measured_line`). With `checkpoint.best: eval`, the best weights are saved in `best/`. With
    `eval.patience`, it ends the run.
    """

    timing = "eval_s"

    def __init__(self, setup: Setup, settings: EvalConfig, prompts: Prompts) -> None:
        super().__init__()
        self.plan, self.encoded, self.processes = setup.plan, setup.encoded, setup.processes
        self.contract, self.trackers = setup.contract, setup.trackers
        self.settings, self.prompts = settings, prompts
        self.folder = setup.plan.run / EVAL_FOLDER / MEASURED
        self.photos = Photos(
            evenly([record.image for record in self.plan.records], MOST_PHOTOS),
            evenly([record.image for record in self.plan.holdout], MOST_PHOTOS),
        )
        self.lines = [line for line in read_evaluations(self.plan.run) if line["step"] <= setup.from_step]
        self.setting = self._setting()
        self.specs = self._usable() if self.processes.is_main else []
        self._asked = False
        self._ended = False
        for line in self.lines:
            self._track(line)

    @classmethod
    def make(cls, setup: Setup) -> Evaluations | None:
        settings, prompts = setup.plan.config.eval, setup.plan.evaluated
        return None if settings is None or prompts is None else cls(setup, settings, prompts)

    @property
    def ended(self) -> bool:
        return self._ended

    def __call__(self, view: View) -> None:
        due = view.step > 0 and (view.step % self.settings.every == 0 or view.last)
        if due and self.processes.is_main and all(line["step"] != view.step for line in self.lines):
            self._evaluate(view)
        if self.settings.patience is not None and (due or not self._asked) and not view.last:
            self._decide(view.step, self.settings.patience)
        self._asked = True

    def report(self) -> dict[str, Any]:
        """Return `evaluation`: the `last` measurement, and the `best`, null if all drift too far; empty without one."""
        return {"evaluation": {"last": self.lines[-1], "best": self._best()}} if self.lines else {}

    def summary(self) -> list[str]:
        best = self._best()
        if best is None:
            return ["best      by evaluation: none, all drift beyond eval.drift_limit"] if self.lines else []
        kept = f"; kept in {BEST}/" * (self.plan.config.checkpoint.best == "eval")
        return [f"best      by evaluation: {describe(best)}{kept}"]

    def _evaluate(self, view: View) -> None:
        started = time.monotonic()
        try:
            line = self._measure(view)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            release(self.plan.device)
            line = None
            self._warn(f"step {view.step}: no evaluation, out of memory")
        except DataError as error:  # a photo that was there at the start
            line = None
            self._warn(f"step {view.step}: no evaluation: {'; '.join(error.problems)}")
        if line is not None:
            self._keep(view, line)
        self.seconds += time.monotonic() - started
        if line is not None:
            self._track(line)

    def _measure(self, view: View) -> dict[str, Any] | None:
        """Draw what is missing, and measure it beside the base. Returns None if nothing can be measured."""
        if not any(SUBJECT in spec.measures for spec in self.specs):
            return None
        name = f"step-{view.step:06d}"
        pictures = [
            *self._pictures(BASE_ROW, view, view.method.disabled(view.transformer)),
            *self._pictures(name, view, view.method.as_exported(view.transformer, view.weights)),
        ]
        line = measured_line(measure(pictures, self.photos, self.specs, self.plan.device), view.step, name)
        return line and {**line, "weights": self.contract["weights"], "setting": self.setting}

    def _usable(self) -> list[EncoderSpec]:
        """Return the encoders that can be loaded, and warn about the others, before the first step."""
        found = []
        for spec in self._specs():
            try:
                with loaded(spec, torch.device("cpu")):
                    found.append(spec)
            except MeasureUnavailable as error:
                flag, item = f"--encoder {spec.name}=FOLDER", f"eval.encoders={{{spec.name}: FOLDER}}"
                self._warn(f"eval: not measured: {'; '.join(error.problems).replace(flag, item)}")
        if not any(SUBJECT in spec.measures for spec in found):
            self._warn("eval: no encoder of likeness can be loaded, so nothing is drawn or measured")
        return found

    def _pictures(self, row: str, view: View, weights: AbstractContextManager[None]) -> list[Picture]:
        """Return the pictures of a row, after drawing those that an earlier attempt has not."""
        wanted = [
            Picture(row, kind, number, seed, self._path(row, kind, number, seed), prompt.text, prompt.scored_as)
            for kind, prompts in ((SCORED, self.prompts.scored), (OF_CLASS, self.prompts.of_class))
            for number, prompt in enumerate(prompts)
            for seed in range(self.settings.seeds)
        ]
        missing = [one for one in wanted if read_recipe(one.file) != self._recipe(one)]
        if missing:
            with weights:
                images = draw_prompts(
                    self.plan,
                    self.encoded.store,
                    self.encoded.captions,
                    view.transformer,
                    [Wanted(one.prompt or "", one.seed) for one in missing],
                    base=row == BASE_ROW,
                    label=f"evaluation, {row}",
                )
            for one, image in zip(missing, images, strict=True):
                save_png(image, one.file, json.dumps(self._recipe(one)))
        return wanted

    def _path(self, row: str, kind: str, number: int, seed: int) -> Path:
        return self.folder / MEASURED_PICTURES / f"{row}-{kind}{number:02d}-seed{seed}.png"

    def _recipe(self, picture: Picture) -> dict[str, Any]:
        """Return the settings of a picture, stored in its file to recognise pictures of other settings."""
        sampler, offset = self.plan.config.preview, self.plan.config.flow.noise_offset
        return {
            "prompt": picture.prompt,
            "steps": sampler.steps,
            "guidance": sampler.guidance,
            "seed": picture.seed,
            "size": self.plan.config.data.side,
            "weights": self.contract["weights"],
            **({"noise_offset": offset} if offset else {}),
        }

    def _setting(self) -> str:
        """Return a digest of what the figures depend on, besides the weights and the encoder."""
        sampler = self.plan.config.preview
        return key(
            "evaluation",
            prompts=[prompt.text for prompt in self.prompts.scored],
            of_class=[prompt.text for prompt in self.prompts.of_class],
            seeds=self.settings.seeds,
            sampler=[sampler.steps, sampler.guidance, self.plan.config.data.side],
            encoders=[spec.label for spec in self._specs()],
        )[:16]

    def _specs(self) -> list[EncoderSpec]:
        return encoders_for("default", self.plan.config.model.base, self.settings.encoders)

    def _keep(self, view: View, line: dict[str, Any]) -> None:
        """Write the measured adapter, the best weights, then the line, and print it."""
        product = view.method.product
        if product.name == ADAPTERS[0]:  # a whole model is too large to keep each
            view.method.export(self.folder / f"step-{view.step:06d}" / product.name, view.weights, self.contract)
        self.lines.append(line)
        is_best = self._best() is line
        if is_best and self.plan.config.checkpoint.best == "eval":
            with new_folder(self.plan.run / BEST) as folder:
                view.method.export(folder / product.name, view.weights, self.contract)
                write_json(folder / BEST_EVALUATED, line)
        write_text(self.plan.run / EVALUATIONS_FILE, "".join(json.dumps(one) + "\n" for one in self.lines))
        say(describe(line) + ", the best so far" * is_best)

    def _best(self) -> Line | None:
        return best_of(self.lines, self.settings.drift_limit) if self.lines else None

    def _decide(self, step: int, patience: int) -> None:
        """End the run if the main process has measured `patience` times without a better one; all processes agree."""
        waited = without_a_better_one(self.lines, self.settings.drift_limit)
        wanted = torch.tensor(float(waited >= patience), device=self.plan.device)
        self._ended = bool(self.processes.gather(wanted)[0])
        if self._ended and self.processes.is_main:
            best, measurements = self._best(), f"{waited} measurement{'s' * (waited != 1)}"
            than = "" if best is None else f" than at step {best['step']}"
            say(f"stopped early at step {step}: {measurements} without a better one{than} (eval.patience)")

    def _track(self, line: Line) -> None:
        self.trackers.log(line["step"], {"eval": {name: line[name] for name in CURVES if line.get(name) is not None}})

    def _warn(self, warning: str) -> None:
        self.warnings.append(warning)
        say(f"warning: {warning}; training continues")
