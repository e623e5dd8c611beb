"""`metrics.jsonl`: one line per step, complete and in order, without making the device wait for the host."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.files.atomic import sync, write_text, writing_in
from sd3tune.files.own_json import is_number, is_whole_number, read_lines
from sd3tune.training.step import StepResult

SIGMA_BINS = 5


Line = dict[str, Any]
Names = Callable[[int], Sequence[str]]
"""Step (0-based) -> its images on all ranks: see `BatchSource.names`."""


@dataclass(frozen=True)
class _Row:
    step: int
    learning_rate: float
    instances: int
    values: Tensor
    """A flat device tensor of this rank: losses, weighted losses and sigmas of the instances, the same of the prior
    samples, the drift and the factor of the prior if there is a limit, the norm of the gradient, and 1 if this rank was
    asked to stop (else 0)."""
    with_drift: bool = False


class Metrics:
    """The metrics of a run. Steps are collected as device tensors; a flush starts their copy, the next one reads it.

    `gather` stacks a tensor of every rank along a new first dimension. Only ranks with `writes` touch the file. `names`
    returns the images of a skipped step, and `concepts` the concepts of any step's instances. Training resumes from
    `last_step`: later lines of an earlier attempt are dropped. On the ranks that write, `sink` receives each line once:
    existing lines at once, new lines when written.
    """

    def __init__(
        self,
        path: Path,
        last_step: int,
        gather: Callable[[Tensor], Tensor],
        writes: bool,
        names: Names = lambda step: [],
        sink: Callable[[Line], object] = lambda line: None,
        concepts: Names = lambda step: [],
    ) -> None:
        self.path, self.gather, self.writes, self.names, self.sink = path, gather, writes, names, sink
        self.concepts = concepts
        self.skipped: dict[int, list[str]] = {}
        """Skipped steps, whose gradient was not finite -> the suspect samples. Includes earlier attempts."""
        self.skipped_in_a_row = 0
        """Number of consecutive skipped steps up to the last step read."""
        self.stop_requested = False
        """True if any rank was asked to stop; it changes on all ranks at the same flush."""
        self.last: Line = {}
        """The newest line read from the device; empty at first."""
        self._rows: list[_Row] = []
        self._copying: tuple[list[_Row], Tensor, torch.cuda.Event | None] | None = None
        kept = [line for line in read_metrics(path) if line["step"] <= last_step]
        for line in kept:
            self._note(line)
        if writes:
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            for line in kept:
                sink(line)

    def add(self, step: int, result: StepResult, stop: bool = False) -> None:
        """Add the result of optimizer step `step` (1-based). `stop` is True if this rank was asked to stop."""
        norm = result.grad_norm.reshape(1)
        drift = [] if result.drift is None else [result.drift]
        parts = [
            result.losses,
            result.weighted,
            result.sigmas,
            *result.prior,
            *drift,
            norm,
            torch.full_like(norm, stop),
        ]
        self._rows.append(_Row(step, result.learning_rate, len(result.losses), torch.cat(parts), bool(drift)))

    def flush(self, wait: bool = False) -> None:
        """Start copying the new steps to the host, and write the previous copy.

        With `wait`, write both and sync the file to disk, so that a checkpoint never refers to lines that a power
        failure could lose.
        """
        self._finish_copy()
        if self._rows:
            stacked = self.gather(torch.stack([row.values for row in self._rows]))
            if stacked.device.type == "cuda":
                host = torch.empty(stacked.shape, dtype=stacked.dtype, pin_memory=True)
                host.copy_(stacked, non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            else:
                host, event = stacked, None
            self._copying, self._rows = (self._rows, host, event), []
        if wait or (self._copying is not None and self._copying[2] is None):
            self._finish_copy()
        if wait and self.writes:
            with writing_in(self.path.parent):
                sync(self.path)

    def check_place(self) -> None:
        """Raise WriteError if the run folder was deleted or moved, before anything can recreate it."""
        if self.writes:
            with writing_in(self.path.parent):
                self.path.stat()

    def _finish_copy(self) -> None:
        if self._copying is None:
            return
        rows, host, event = self._copying
        self._copying = None
        if event is not None:
            event.synchronize()
        lines = [_line(row, host[:, index], self.names, self.concepts) for index, row in enumerate(rows)]
        for line in lines:
            self._note(line)
        self.stop_requested |= bool(host[..., -1].any())
        if self.writes:
            with writing_in(self.path.parent), open(self.path, "a", encoding="utf-8", opener=_existing) as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
            for line in lines:
                self.sink(line)

    def _note(self, line: Line) -> None:
        self.last = line
        if line["grad_norm"] is None:
            self.skipped[line["step"]] = line.get("suspects", [])
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0


def _existing(path: str, flags: int) -> int:
    return os.open(path, flags & ~os.O_CREAT)


def read_metrics(path: Path) -> list[Line]:
    """Return the lines of a metrics file, without a truncated last line. Raises RunError."""
    return read_lines(path, _problem)


def _problem(line: Line) -> str | None:
    return problem_of_measurement(line, numbers=("lr",), losses=("loss", "grad_norm"))


def problem_of_measurement(line: Line, numbers: Sequence[str], losses: Sequence[str]) -> str | None:
    """Return the fault of a step's line, which may have been edited; None for a valid one.

    A valid line has a step, all of `numbers`, and all of `losses`, where null stands for a value that was not finite.
    Other values are numbers, text, lists of them, or objects of numbers.
    """
    if not is_whole_number(line.get("step")):
        return "step: not a whole number"
    wrong = [name for name in numbers if not is_number(line.get(name))]
    wrong += [name for name in losses if name not in line or not _is_loss(line[name])]
    wrong += [name for name, value in line.items() if not _is_known(value)]
    return f"{wrong[0]}: not a number that a run measures" if wrong else None


def _is_loss(value: object) -> bool:
    return value is None or is_number(value)


def _is_known(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_is_loss, value.values()))
    return all(isinstance(one, str) or _is_loss(one) for one in (value if isinstance(value, list) else [value]))


def relative_change(loss: float, base: float | None) -> str:
    """Return a loss's change against the base's, such as `-3.1 %`; in words if that is 0 or was not finite."""
    return f"{100 * (loss / base - 1):+.1f} %" if base else "no comparison"


def by_sigma(sigmas: Sequence[float], losses: Sequence[float]) -> dict[str, float | None]:
    """Return the mean loss in each fifth of the range of sigma that has samples, as `{"0.2-0.4": 0.31}`."""
    bins: dict[str, list[float]] = {}
    for sigma, loss in sorted(zip(sigmas, losses, strict=True)):
        number = min(int(sigma * SIGMA_BINS), SIGMA_BINS - 1)
        bins.setdefault(f"{number / SIGMA_BINS:.1f}-{(number + 1) / SIGMA_BINS:.1f}", []).append(loss)
    return {name: _finite(sum(in_bin) / len(in_bin)) for name, in_bin in bins.items()}


def _line(row: _Row, values: Tensor, names: Names, concepts: Names) -> Line:
    """Return the line of a step from its `values` [ranks, ...]."""
    end = -4 if row.with_drift else -2
    instances, prior = _samples(values[:, : 3 * row.instances]), _samples(values[:, 3 * row.instances : end])
    prior = prior[:, ~prior[2].isnan()]  # without the padding
    (losses, weighted, sigmas), (prior_losses, prior_weighted, prior_sigmas) = instances.tolist(), prior.tolist()
    line: Line = {
        "step": row.step,
        "loss": _finite((sum(weighted) + sum(prior_weighted)) / len(weighted)),
        "lr": row.learning_rate,
        "grad_norm": _finite(values[0, -2].item()),
        "loss_by_sigma": by_sigma(sigmas, losses),
    }
    if of_concepts := concepts(row.step - 1):
        line["loss_by_concept"] = _means(of_concepts, losses)
    if prior_losses:
        line["prior_loss"] = _finite(sum(prior_losses) / len(prior_losses))
    if row.with_drift:
        line["drift"], line["prior_weight"] = map(_finite, values[0, -4:-2].tolist())
    if line["grad_norm"] is None:
        line["suspects"] = _suspects(names(row.step - 1), [*losses, *prior_losses], [*sigmas, *prior_sigmas])
    return line


def _means(labels: Sequence[str], losses: Sequence[float]) -> dict[str, float | None]:
    """Return the mean loss of each label, in alphabetical order."""
    found: dict[str, list[float]] = {}
    for label, loss in sorted(zip(labels, losses, strict=True)):
        found.setdefault(label, []).append(loss)
    return {label: _finite(sum(of) / len(of)) for label, of in found.items()}


def _samples(values: Tensor) -> Tensor:
    """Reshape [ranks, 3 * n] to [3, ranks * n]."""
    return values.unflatten(1, (3, values.shape[1] // 3)).movedim(1, 0).flatten(1)


def _suspects(names: Sequence[str], losses: Sequence[float], sigmas: Sequence[float]) -> list[str]:
    """Return the samples of a skipped step whose loss is not finite; all of them if only the gradient was not."""
    samples = [(f"{name} at sigma {sigma:.3f}", loss) for name, sigma, loss in zip(names, sigmas, losses, strict=False)]
    return [sample for sample, loss in samples if not math.isfinite(loss)] or [sample for sample, _ in samples]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
