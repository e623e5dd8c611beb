"""The work on a sweep: a few trials at once, each a process, until all have ended."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sd3tune.errors import Interrupted, RunError
from sd3tune.invocation import command_line
from sd3tune.reporting import progress_bar, say
from sd3tune.sweep.attempt import Attempt, is_taken, measured_so_far, result_of
from sd3tune.sweep.results import best_row, describe_row
from sd3tune.sweep.trials import Claim, Row, Trials

_POLL = 0.3
"""Seconds between looks at the processes."""
_WAIT = 2.0
"""Seconds between looks for a trial to take up."""


class Worker:
    """A place for one trial at a time."""

    def __init__(self, trials: Trials, config: Path, run_name: str, number: int) -> None:
        self.trials, self.config, self.run_name = trials, config, run_name
        self.claim: Claim | None = None
        self._attempt: Attempt | None = None
        self._pruning = False
        self._sweep = trials.file.settings
        self._environment = {"CUDA_VISIBLE_DEVICES": str(self._sweep.gpus[number])} if self._sweep.gpus else {}
        if self._sweep.workers > 1:
            threads = max(1, (os.cpu_count() or 1) // self._sweep.workers)
            self._environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))

    def begin(self, claim: Claim) -> None:
        """Take a trial."""
        self.claim, self._attempt, self._pruning = claim, None, False

    def look(self) -> None:
        """Start, watch or end the trial."""
        if self.claim is None:
            return
        if self._attempt is None:
            self._start(self.claim)
        elif self._attempt.code is None:
            self._watch(self.claim, self._attempt)
        elif not self._attempt.stopping or self._pruning:
            self._end(self.claim, self._attempt)

    def stop(self) -> None:
        """Let the training save its step and end."""
        if self._attempt is not None:
            self._attempt.stop()

    def release(self) -> None:
        """Let others take up the trial."""
        if self.claim is not None:
            self.claim.lock.release()

    @property
    def has_stopped(self) -> bool:
        return self._attempt is None or self._attempt.code is not None

    def _run(self, claim: Claim) -> Path:
        return self.trials.folder / claim.name

    def _start(self, claim: Claim) -> None:
        run = self._run(claim)
        if is_taken(run):  # an earlier attempt is saving
            return
        if self._took_result(claim):
            return
        name = f"name={self.run_name[: 99 - len(claim.name)]}-{claim.name}"
        self._attempt = Attempt(self.config, run, [*claim.overrides, name], self._environment)

    def _watch(self, claim: Claim, attempt: Attempt) -> None:
        if self._sweep.pruning is None or self._pruning:
            return
        if self.trials.report(claim, measured_so_far(attempt.run, self._sweep)):
            self._pruning = True
            attempt.stop()

    def _end(self, claim: Claim, attempt: Attempt) -> None:
        if attempt.code == 0 and self._took_result(claim):
            return
        if attempt.was_interrupted:
            step, value = measured_so_far(attempt.run, self._sweep)[-1]
            self.trials.prune(claim, step, f"{value:.6g} is worse than the median")
        else:
            self.trials.fail(claim, attempt.failure())
        self.claim = None

    def _took_result(self, claim: Claim) -> bool:
        """Store the objective of the run. Return False if it is not finished."""
        found = result_of(self._run(claim), self._sweep)
        if found is None:
            return False
        if found.value is not None and found.step is not None:
            self.trials.complete(claim, found.value, found.step)
        elif found.drifts:
            self.trials.prune(claim, found.step, found.reason)
        else:
            self.trials.fail(claim, found.reason)
        self.claim = None
        return True


def carry_out(trials: Trials, config: Path, run_name: str, stop_requested: Callable[[], bool]) -> list[Row]:
    """Work on the trials until all have ended, also those of other processes on this folder; return them.

    Each ended trial is printed. Raises RunError if more than `max_failed` trials failed, and Interrupted once
    `stop_requested` returns True; the trials are then saved, and go on when this is called again. If this process is
    killed, they save and end, too.
    """
    sweep = trials.file.settings
    workers = [Worker(trials, config, run_name, number) for number in range(sweep.workers)]
    rows, looked = trials.rows(), 0.0
    try:
        with progress_bar(total=trials.count, initial=len(_ended(rows)), desc=sweep.name, unit="trial") as bar:
            while True:
                _check_failures(trials, rows)
                free = [worker for worker in workers if worker.claim is None]
                if free and time.monotonic() - looked > _WAIT:
                    _claim(trials, free)
                    looked = time.monotonic()
                for worker in workers:
                    worker.look()
                before, rows = _ended(rows), trials.rows()
                for number in sorted(_ended(rows) - before):
                    looked = 0.0  # its worker is free
                    say(describe_row(rows[number], sweep, best_row(rows, sweep)))
                    bar.update()
                if len(rows) >= trials.count and not trials.busy_here():
                    return rows
                if stop_requested():
                    raise Interrupted(_stopped(trials, len(_ended(rows))))
                time.sleep(_POLL)
    finally:
        _stop(workers)
        for worker in workers:
            worker.release()


def _claim(trials: Trials, free: Sequence[Worker]) -> None:
    for worker in free:
        claim = trials.claim()
        if claim is None:
            return
        worker.begin(claim)


def _ended(rows: Sequence[Row]) -> set[int]:
    return {row.number for row in rows if row.state != "running"}


def _stop(workers: Sequence[Worker]) -> None:
    """Let all trainings save their step, and wait for them."""
    for worker in workers:
        worker.stop()
    while not all(worker.has_stopped for worker in workers):
        time.sleep(_POLL)


def _check_failures(trials: Trials, rows: Sequence[Row]) -> None:
    """Raise RunError if too many trials failed."""
    failed = [row for row in rows if row.state == "failed"]
    most = trials.file.settings.max_failed
    if len(failed) > most:
        raise RunError(
            *(f"{row.name} failed: {row.reason}" for row in failed),
            f"{trials.file.at('max_failed')}: {len(failed)} trials failed, and {most} may; correct the cause, and "
            "raise it to go on with the other trials",
        )


def _stopped(trials: Trials, done: int) -> str:
    command = command_line("sd3tune", "sweep", trials.file.source)
    return f"{trials.folder}: stopped, {done} of {trials.count} trials are done; `{command}` continues"
