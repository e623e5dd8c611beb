"""Measure one cell: check that both sides compute the same, then time them in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.bare import BareLoop, Ready, ready
from benchmarks.cells import BATCH_SIZE, CLIP_TOKENS, MODELS, RANK, T5_TOKENS, Cell
from benchmarks.trainer import Trainer, make_config, make_trainer
from sd3tune.forecast.footprint import Footprint
from sd3tune.runtime.device import DTYPES
from sd3tune.training.loop import View
from sd3tune.training.step import StepResult

READY_BATCHES = 4
MIN_ROUNDS, MAX_ROUNDS = 12, 60
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}
"""Relative tolerances of the check. The bare loop's moments are in the base's dtype; the trainer's are fp32."""


class GateError(Exception):
    """The two sides compute different results, so their speeds cannot be compared."""


def run_cell(cell: Cell, folder: Path, rounds: int | None = None, steps: int | None = None) -> dict[str, Any]:
    """Measure one cell, with files under `folder`. Return a row of the results. Raises GateError.

    `rounds` (an even number) and `steps` per round override the cell's.
    """
    cell = cell if steps is None else replace(cell, steps=steps)
    model = MODELS[cell.model]
    with Footprint() as ours:
        trainer = make_trainer(make_config(cell), model, folder)
    with closing(trainer.batches):
        weights = trainer.state.master.named(trainer.state.master.master)
        inputs = [_ready(trainer, step) for step in range(READY_BATCHES)]
        with Footprint() as theirs:
            transformer = model.build(DTYPES[cell.dtype]).to(trainer.device)
            modules = trainer.method.select(transformer)
            bare = BareLoop(transformer, trainer.config, modules, weights, inputs)
        with ours:
            result = trainer.step()
        with theirs:
            loss, norm = bare.step()
        gate = check_same(trainer, result, bare, loss, norm, TOLERANCES[cell.dtype])
        memory = {"trainer": peak_of_a_step(ours, trainer.step), "bare": peak_of_a_step(theirs, bare.step)}
        if rounds is None:
            rounds = _affordable_rounds(cell, bare, trainer.device)
        turns = Turns(trainer.state.step, rounds, cell.steps, bare.step, trainer.device)
        # One step more than measured, as the last one saves a checkpoint.
        trainer.train(until=turns.last_step + 1, callback=turns)
    return {
        "cell": cell.name,
        "model": model.description,
        "dtype": cell.dtype,
        "image_tokens": model.image_tokens,
        "text_tokens": CLIP_TOKENS + T5_TOKENS,
        "batch_size": BATCH_SIZE,
        "rank": RANK,
        "trained_parameters": trainer.state.master.master.numel(),
        "gate": gate,
        "peak_bytes": memory,
        "rounds": rounds,
        "steps_per_round": cell.steps,
        "target": cell.target,
        **summarise(turns.trainer, turns.bare, cell.steps),
    }


def check_same(
    trainer: Trainer, result: StepResult, bare: BareLoop, loss: Tensor, norm: Tensor, tolerance: float
) -> dict[str, float]:
    """Return the relative errors of loss, gradient norm and gradient after a first step on the same draws.

    The gradient is the clipped one, from AdamW's first moment. Raises GateError.
    """
    moment = trainer.state.optimizer.state[trainer.state.master.master]["exp_avg"]
    errors = {
        "loss": _relative_error(result.weighted.mean(), loss),
        "gradient_norm": _relative_error(result.grad_norm, norm),
        "gradient": _relative_error(moment, bare.first_moment()),
    }
    if not max(errors.values()) <= tolerance:
        raise GateError(f"{trainer.config.name}: trainer and bare loop differ by {errors}; at most {tolerance:g}")
    return errors


def peak_of_a_step(side: Footprint, step: Callable[[], object]) -> int:
    """Return the peak bytes of live tensors in a step, of all tensors that the side has created.

    It includes model, adapter, optimizer, saved activations and temporaries, but not a kernel's own memory or the
    batches that a reading thread has ready.
    """
    with side:
        side.peak = side.now
        step()
    return side.peak


class Turns:
    """A callback of the loop that runs the other side in between, and times both.

    After a warm-up turn each, the order is trainer, bare, bare, trainer, so that linear drift cancels out.
    A lap is (wall seconds, CPU seconds of all threads of the process).
    """

    def __init__(
        self, first_step: int, rounds: int, steps: int, bare_step: Callable[[], object], device: torch.device
    ) -> None:
        if rounds % 2:
            raise ValueError(f"an even number of rounds is needed, not {rounds}")
        self.first_step, self.rounds, self.steps = first_step, rounds, steps
        self.bare_step, self.device = bare_step, device
        self.trainer: list[tuple[float, float]] = []
        self.bare: list[tuple[float, float]] = []
        self._started = (0.0, 0.0)

    @property
    def last_step(self) -> int:
        return self.first_step + (1 + self.rounds) * self.steps

    def __call__(self, view: View) -> None:
        turn, within = divmod(view.step - self.first_step, self.steps)
        if within or view.step > self.last_step:
            return
        if turn > 1:
            self.trainer.append(self._lap())
        if turn == 1:
            self._bare_turn()
        elif turn > 1 and turn % 2 == 0:
            self.bare += [self._bare_turn(), self._bare_turn()]
        self._started = _clock(self.device)

    def _bare_turn(self) -> tuple[float, float]:
        self._started = _clock(self.device)
        for _ in range(self.steps):
            self.bare_step()
        return self._lap()

    def _lap(self) -> tuple[float, float]:
        now = _clock(self.device)
        return now[0] - self._started[0], now[1] - self._started[1]


def summarise(trainer: list[tuple[float, float]], bare: list[tuple[float, float]], steps: int) -> dict[str, Any]:
    """Return medians over the rounds; ratios are the trainer's speed over the bare loop's, per round."""
    wall, cpu = ([(t[clock], b[clock]) for t, b in zip(trainer, bare, strict=True)] for clock in (0, 1))
    return {
        "trainer_images_per_s": BATCH_SIZE * steps / statistics.median(t for t, _ in wall),
        "bare_images_per_s": BATCH_SIZE * steps / statistics.median(b for _, b in wall),
        "ratio": _quartiles([b / t for t, b in wall]),
        "cpu_ratio": _quartiles([b / t for t, b in cpu]),
        "overhead_ms_per_step": _quartiles([1000 * (t - b) / steps for t, b in wall]),
        "cpu_overhead_ms_per_step": _quartiles([1000 * (t - b) / steps for t, b in cpu]),
        "seconds": {"trainer": [round(t, 4) for t, _ in wall], "bare": [round(b, 4) for _, b in wall]},
    }


def _ready(trainer: Trainer, step: int) -> Ready:
    batch = trainer.batches.fetch(step, 0)
    conditioning = trainer.method.conditioning(batch.embeddings, trainer.transformer)
    return ready(batch.latents, batch.noise, batch.sigma, *conditioning)


def _affordable_rounds(cell: Cell, bare: BareLoop, device: torch.device) -> int:
    turn = min(_seconds_of_a_turn(cell, bare, device) for _ in range(2))
    affordable = int(cell.seconds / (2 * turn)) // 2 * 2
    return min(max(affordable, MIN_ROUNDS), MAX_ROUNDS)


def _seconds_of_a_turn(cell: Cell, bare: BareLoop, device: torch.device) -> float:
    started = _clock(device)
    for _ in range(cell.steps):
        bare.step()
    return _clock(device)[0] - started[0]


def _clock(device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter(), time.process_time()


def _relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def _quartiles(values: list[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}
