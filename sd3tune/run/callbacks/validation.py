"""Held-out loss of the weights as exported, on images that are not trained on."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sd3tune.config.run_folder import VALIDATION_FILE
from sd3tune.data.sampler import generator
from sd3tune.files.atomic import new_folder, write_json, write_text
from sd3tune.flow.objective import offset_noise, velocity_loss, velocity_target
from sd3tune.model.load.components import vae_config
from sd3tune.model.load.latents import sample_latents
from sd3tune.model.load.text import on_device
from sd3tune.reporting import progress_bar, say
from sd3tune.run.callbacks.base import RunCallback, Setup
from sd3tune.run.encoding import Encoded
from sd3tune.run.folder import BEST, BEST_FILE, read_validation
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes
from sd3tune.tracking.trackers import Trackers
from sd3tune.training.ahead import modulated
from sd3tune.training.batches import Batch
from sd3tune.training.examples import Example
from sd3tune.training.loop import View, export_weights
from sd3tune.training.masked import read_positions
from sd3tune.training.metrics import SIGMA_BINS, by_sigma, relative_change
from sd3tune.training.step import predict_velocity

SIGMAS = tuple((bin + 0.5) / SIGMA_BINS for bin in range(SIGMA_BINS))
"""Midpoints of the sigma bins."""
LOWEST_IS_NOT_BEST = "a lower loss does not mean better pictures: compare previews before taking one"


class Validation(RunCallback):
    """A training callback that measures the held-out loss.

    It runs before the first step, every `validation.every` steps and after the last. The loss is the squared error of
    the velocity, even if another loss is minimised, so that runs are comparable; an image's mask weighs it as in
    training. It is measured for every held-out image at each of `SIGMAS`; the noise depends only on the image's number.
    The processes divide the images. Each measurement is a line of `validation.jsonl`. The weights with the lowest mean
    loss are saved in `best/`, unless `checkpoint.best` is `eval`; they do not always draw best.
    """

    timing = "validation_s"

    def __init__(
        self,
        plan: Plan,
        encoded: Encoded,
        processes: Processes,
        contract: Mapping[str, Any],
        trackers: Trackers,
        from_step: int,
    ) -> None:
        super().__init__()
        self.plan, self.store, self.processes, self.contract = plan, encoded.store, processes, contract
        self.trackers = trackers
        self.images = len(encoded.holdout)
        self.mine = self._share(list(enumerate(encoded.holdout)))
        self.path = plan.run / VALIDATION_FILE
        self.lines = [line for line in read_validation(plan.run) if line["step"] <= from_step]
        measured = self.lines[0] if self.lines else {"noise_offset": plan.config.flow.noise_offset}
        self.noise_offset: float = measured.get("noise_offset", 0.0)
        """Constant over a run; 0 for a run that an earlier version began."""
        self._base: Tensor | None = None
        for line in self.lines:
            self._track(line)

    def _share(self, numbered: list[tuple[int, Example]]) -> list[tuple[int, Example]]:
        """Return this process's images. In lockstep all have as many; results beyond the last image are not used."""
        rank, world = self.processes.rank, self.processes.world
        mine = numbered[rank::world]
        lacking = -(-len(numbered) // world) - len(mine) if self.processes.lockstep else 0
        return mine + numbered[:1] * lacking

    @classmethod
    def make(cls, setup: Setup) -> Validation | None:
        if not setup.encoded.holdout:
            return None
        return cls(setup.plan, setup.encoded, setup.processes, setup.contract, setup.trackers, setup.from_step)

    @property
    def keeps_best(self) -> bool:
        """True if `best/` holds the weights with the lowest loss."""
        return self.plan.config.checkpoint.best == "loss"

    @property
    def best(self) -> dict[str, Any] | None:
        """The first line with the lowest loss; None without a finite loss."""
        finite = [line for line in self.lines if line["loss"] is not None]
        return min(finite, key=lambda line: line["loss"], default=None)

    def report(self) -> dict[str, Any]:
        """Return `held_out`: the `last` measurement, and the `best`, with the lowest loss; empty without one."""
        return {"held_out": {"last": self.lines[-1], "best": self.best}} if self.lines else {}

    def summary(self) -> list[str]:
        """Return the lines with the last and the lowest measurement, for the end of a run."""
        if not self.lines or self.best is None:
            return []
        last, best = self.lines[-1], self.best
        lowest = f"the lowest held-out loss was {best['loss']:.4f} at step {best['step']}"
        lowest += f", kept in {BEST}/" * self.keeps_best
        kept = "the lowest held-out loss" + f", also in {BEST}/" * self.keeps_best if best is last else lowest
        return [f"held out  {describe(last)}; {kept}", f"          {LOWEST_IS_NOT_BEST}"]

    def __call__(self, view: View) -> None:
        due = view.step % self.plan.config.validation.every == 0 or view.last
        if not due or view.step in (line["step"] for line in self.lines):
            return
        started = time.monotonic()
        line = self._measure(view)
        self.lines.append(line)
        if self.best is line and self.keeps_best:
            self._keep(view, line)
        if self.processes.is_main:
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
            say(describe(line) + ", the lowest so far" * (self.best is line and view.step > 0))
        self.seconds += time.monotonic() - started
        self._track(line)

    def _track(self, line: Mapping[str, Any]) -> None:
        self.trackers.log(line["step"], {"validation": {name: line[name] for name in line if "loss" in name}})

    def _measure(self, view: View) -> dict[str, Any]:
        if self._base is None:
            self._base = self._losses(view, view.method.disabled(view.transformer), "the base")
        trained = self._losses(view, view.method.as_exported(view.transformer, view.weights), f"step {view.step}")
        line = {"step": view.step, "images": self.images, "weights": self.contract["weights"]}
        line |= {"noise_offset": self.noise_offset} if self.noise_offset else {}
        for prefix, losses in (("", trained), ("base_", self._base)):
            bins = by_sigma(SIGMAS, losses.mean(0).tolist())
            values = list(bins.values())
            mean = None if None in values else sum(values) / len(values)  # type: ignore[arg-type]
            line |= {f"{prefix}loss": mean, f"{prefix}loss_by_sigma": bins}
        return line

    @torch.no_grad()
    def _losses(self, view: View, weights: AbstractContextManager[None], what: str) -> Tensor:
        """Return the losses [images, sigmas] of all processes, on the CPU."""
        rows = -(-self.images // self.processes.world)
        losses = torch.full((rows, len(SIGMAS)), torch.nan, device=self.plan.device)
        bar = progress_bar(
            total=len(self.mine) * len(SIGMAS),
            desc=f"held-out loss, {what}",
            leave=False,
            delay=2,
            disable=not self.processes.is_main,
        )
        with weights, bar:
            every = itertools.chain.from_iterable(itertools.starmap(self._batches, self.mine))
            for place, batch in enumerate(modulated(every, view.transformer, view.method)):
                velocity = predict_velocity(view.transformer, view.method, batch)
                target = velocity_target(batch.latents, batch.noise)
                loss = velocity_loss(velocity, target, batch.position_weights)[0]
                losses[divmod(place, len(SIGMAS))] = loss
                bar.update()
        gathered = self.processes.gather(losses).transpose(0, 1).flatten(0, 1)  # row r of rank k is image r * world + k
        return gathered[: self.images].cpu()

    def _batches(self, number: int, example: Example) -> Sequence[Batch]:
        """Return the image as a batch for each of `SIGMAS`."""
        device, vae = self.plan.device, vae_config(self.plan.base)
        entry = {name: tensor[None].to(device) for name, tensor in self.store.get(example.images[0]).items()}
        source = generator(0, "validation", number)
        eps, plain = torch.randn((2, *entry["mean"].shape), generator=source)
        offset = torch.randn(plain.shape[:2], generator=generator(0, "validation", number, "noise_offset"))
        eps, noise = (drawn.to(device) for drawn in (eps, offset_noise(plain, offset, self.noise_offset)))
        latents = sample_latents(entry["mean"], entry["std"], eps, vae["scaling_factor"], vae["shift_factor"])
        embeddings = {
            encoder: on_device({name: tensor[None] for name, tensor in self.store.get(key).items()}, device)
            for encoder, key in example.captions.items()
        }
        one = torch.ones(1, device=device)
        weights = read_positions(self.store, [(example, 0)], latents.shape[2:]).get("position_weights")
        measured = Batch(latents, noise, one, embeddings, one, [example.name], instances=1, kept=slice(0, 0))
        measured = replace(measured, position_weights=None if weights is None else weights.to(device))
        return [replace(measured, sigma=sigma * one) for sigma in SIGMAS]

    def _keep(self, view: View, line: Mapping[str, Any]) -> None:
        product = view.method.product.name
        if not self.processes.is_main:
            export_weights(view.method, self.plan.run / BEST / product, view.weights, self.contract, self.processes)
            return
        with new_folder(self.plan.run / BEST) as folder:
            export_weights(view.method, folder / product, view.weights, self.contract, self.processes)
            write_json(folder / BEST_FILE, line)


def describe(line: Mapping[str, Any]) -> str:
    """Return a measurement in words."""
    if line["loss"] is None:
        return f"step {line['step']}: the loss on held-out images is not finite"
    change = relative_change(line["loss"], line["base_loss"])
    images = "1 held-out image" if line["images"] == 1 else f"{line['images']} held-out images"
    return f"step {line['step']}: loss {line['loss']:.4f} on {images}, {change} against the base"
