"""A trial's process, `sd3tune train ... --resume`, and what it has measured so far."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config.run_folder import VALIDATION_FILE, read_run_file
from sd3tune.errors import RunError
from sd3tune.files.own_json import is_number, is_whole_number, read_lines
from sd3tune.invocation import program
from sd3tune.run.listing import is_running
from sd3tune.runtime.signals import STOP_WITH_PARENT
from sd3tune.sweep.settings import VALIDATION_LOSS, Sweep

LOGS = "logs"
_EVALUATIONS_FILE = "eval.jsonl"
_INTERRUPTED = 130
_TAIL = 2**14
"""Bytes at the end of a log in which the error stands."""


@dataclass(frozen=True)
class Result:
    """The objective of a finished run; `value` is None if it has none."""

    value: float | None
    step: int | None
    reason: str = ""
    """Why there is no value."""
    drifts: bool = False
    """True if no weights of the run are within `eval.drift_limit`."""


class Attempt:
    """One process of a trial. It ends with this one, saving its last step: its standard input is a pipe."""

    def __init__(self, config: Path, run: Path, overrides: Sequence[str], environment: dict[str, str]) -> None:
        self.run, self.stopping = run, False
        self.log = run.parent / LOGS / f"{run.name}.txt"
        self.log.parent.mkdir(exist_ok=True)
        words = ["train", str(config), *overrides, f"output_dir={run}", "--resume"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*program(), *words],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, STOP_WITH_PARENT: "1", **environment},
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        """The exit code; None while the process runs."""
        return self._process.poll()

    @property
    def was_interrupted(self) -> bool:
        return self.stopping and self.code == _INTERRUPTED

    def stop(self) -> None:
        """Let the training save its current step and end."""
        if not self.stopping:
            self._process.send_signal(signal.SIGINT)
        self.stopping = True

    def failure(self) -> str:
        """Return why the process ended, in one line."""
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
            text = log.read().decode("utf-8", "replace")
        errors = re.findall(r"(?:^|[\r\n])error: ([^\r\n]+)", text)
        if errors:
            return str(errors[-1])
        code = self.code or 0
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return f"{how}; see {self.log}"


def is_taken(run: Path) -> bool:
    """Return whether a process of an earlier attempt is still saving there."""
    return is_running(run)


def result_of(run: Path, sweep: Sweep) -> Result | None:
    """Return the objective of a finished run; None if it is not finished."""
    report = read_run_file(run).get("report")
    if not isinstance(report, dict):
        return None
    group, figure = ("held_out", "loss") if sweep.objective == VALIDATION_LOSS else ("evaluation", sweep.objective)
    measured = report.get(group)
    if not isinstance(measured, dict):
        return Result(None, None, f"the run measured no {sweep.objective}")
    best = measured.get("best")
    if not isinstance(best, dict):
        if group == "evaluation":
            return Result(None, None, "all weights drift beyond eval.drift_limit", drifts=True)
        return Result(None, None, "the run has no finite held-out loss")
    value, step = best.get(figure), best.get("step")
    if value is None or not is_number(value):
        return Result(None, step, f"the run measured no {sweep.objective}")
    return Result(float(value), step)


def measured_so_far(run: Path, sweep: Sweep) -> list[tuple[int, float]]:
    """Return the (step, objective) of each measurement; without step 0, which is the base's."""
    if sweep.objective == VALIDATION_LOSS:
        name, figure = VALIDATION_FILE, "loss"
    else:
        name, figure = _EVALUATIONS_FILE, sweep.objective
    try:
        lines = read_lines(run / name, _no_problem)
    except RunError:
        return []
    return [
        (line["step"], float(line[figure]))
        for line in lines
        if is_whole_number(line.get("step")) and line["step"] > 0 and is_number(line.get(figure))
    ]


def best_weights(run: Path, sweep: Sweep, step: int | None) -> Path:
    """Return the weights that were measured as best, if the run kept them, else its last ones."""
    kept, file = run / "best", "validation.json" if sweep.objective == VALIDATION_LOSS else "evaluation.json"
    if (kept / file).is_file():
        return kept
    measured = run / "eval" / "measured" / f"step-{step or 0:06d}"
    return measured if sweep.objective != VALIDATION_LOSS and measured.is_dir() else run


def _no_problem(line: dict[str, Any]) -> None:
    return None
