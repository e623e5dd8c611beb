"""`metrics.jsonl`: one line a step, whole and in order, without making the device wait for the host."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd3tune.atomic import write_text
from sd3tune.train.step import StepResult

SIGMA_BINS = 5


@dataclass(frozen=True)
class _Row:
    step: int
    learning_rate: float
    values: Tensor
    """Losses, weighted losses and sigmas of this rank's samples, then the gradient norm; one flat device tensor."""


class Metrics:
    """Collects steps as device tensors; a window's copy to the host is started at one flush and read at the next.

    `gather` stacks a tensor of every rank along a new first dimension; only `writes` ranks touch the file.
    `last_step` is the step that training resumes from: later lines of an earlier attempt are dropped.
    """

    def __init__(self, path: Path, last_step: int, gather: Callable[[Tensor], Tensor], writes: bool) -> None:
        self.path, self.gather, self.writes = path, gather, writes
        self.skipped: list[int] = []
        """Steps whose gradient was not finite, which the optimizer passed over; an earlier attempt's included."""
        self.last: dict[str, Any] = {}
        self._rows: list[_Row] = []
        self._copying: tuple[list[_Row], Tensor, torch.cuda.Event | None] | None = None
        if writes:
            kept = [line for line in read_metrics(path) if line["step"] <= last_step]
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
            self.last = kept[-1] if kept else {}
            self.skipped = [line["step"] for line in kept if line["grad_norm"] is None]

    def add(self, step: int, result: StepResult) -> None:
        """Note the result of optimizer step `step` (1-based)."""
        values = torch.cat([result.losses, result.weighted, result.sigmas, result.grad_norm.reshape(1)])
        self._rows.append(_Row(step, result.learning_rate, values))

    def flush(self, wait: bool = False) -> None:
        """Start copying what was added since, and write what was being copied; with `wait`, write everything."""
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

    def _finish_copy(self) -> None:
        if self._copying is None:
            return
        rows, host, event = self._copying
        self._copying = None
        if event is not None:
            event.synchronize()
        lines = [_line(row, host[:, index]) for index, row in enumerate(rows)]
        self.skipped += [line["step"] for line in lines if line["grad_norm"] is None]
        self.last = lines[-1]
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that was cut off in the middle is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _line(row: _Row, values: Tensor) -> dict[str, Any]:
    """`values` [ranks, 3 * samples + 1] of one step as a line of the file."""
    samples = (values.shape[1] - 1) // 3
    losses, weighted, sigmas = (part.reshape(-1).tolist() for part in values[:, :-1].split(samples, dim=1))
    bins: dict[str, list[float]] = {}
    for loss, sigma in sorted(zip(losses, sigmas, strict=True), key=lambda pair: pair[1]):
        number = min(int(sigma * SIGMA_BINS), SIGMA_BINS - 1)
        bins.setdefault(f"{number / SIGMA_BINS:.1f}-{(number + 1) / SIGMA_BINS:.1f}", []).append(loss)
    return {
        "step": row.step,
        "loss": _finite(sum(weighted) / len(weighted)),
        "lr": row.learning_rate,
        "grad_norm": _finite(values[0, -1].item()),
        "loss_by_sigma": {name: _finite(sum(of) / len(of)) for name, of in bins.items()},
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
