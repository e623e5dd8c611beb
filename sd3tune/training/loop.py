"""The training loop: step, log, save, callbacks. It uses the method and the callbacks only through their protocols."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.config.run_folder import METRICS_FILE
from sd3tune.config.schema import Config
from sd3tune.errors import RunError
from sd3tune.methods import Method
from sd3tune.reporting import progress_bar, say
from sd3tune.runtime.processes import Processes
from sd3tune.training.batches import BatchSource
from sd3tune.training.checkpoint import list_checkpoints, prune, save_checkpoint, save_sharded_checkpoint
from sd3tune.training.metrics import Line, Metrics
from sd3tune.training.objective import Objective
from sd3tune.training.step import TrainState, train_step

if TYPE_CHECKING:
    from sd3tune.reporting import Bar


@dataclass(frozen=True)
class View:
    """A read-only view of the run for callbacks."""

    step: int
    """Number of completed optimizer steps."""
    last: bool
    """True after the last step of the run."""
    transformer: SD3Transformer2DModel
    method: Method
    weights: Mapping[str, Tensor]
    """The weights that an export would write now, in fp32: the EMA if there is one, else the master.

    Where the processes divide the trained parameters, reading one gathers it: all must read the same, in one order.
    """
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """The newest metrics line read from the device, possibly of an earlier step; empty at first."""


class Callback(Protocol):
    """Called on every rank before the first step of an attempt and after each step. It must not change the run."""

    def __call__(self, view: View) -> None: ...


def train(
    *,
    config: Config,
    run: Path,
    state: TrainState,
    transformer: SD3Transformer2DModel,
    method: Method,
    batches: BatchSource,
    objective: Objective,
    processes: Processes,
    identity: Mapping[str, Any],
    contract: Mapping[str, Any],
    callbacks: Sequence[Callback] = (),
    stop_requested: Callable[[], bool] = lambda: False,
    ended: Callable[[], bool] = lambda: False,
    sink: Callable[[Line], object] = lambda line: None,
    save_when_interrupted: bool = False,
) -> Metrics:
    """Train from `state.step` to `config.train.total_steps`; the last step is always checkpointed.

    If `ended` returns True after a step, on every rank, that step is the last: it is checkpointed, and the callbacks
    are called once more, with `View.last`.

    Saves a checkpoint and raises KeyboardInterrupt when `stop_requested` returns True on any rank. Raises RunError when
    the gradient was not finite for `train.max_skipped` consecutive steps.
    With `save_when_interrupted` and a single process, a KeyboardInterrupt from outside also saves a checkpoint of the
    last complete step, then propagates.
    """
    metrics = Metrics(
        run / METRICS_FILE, state.step, processes.gather, processes.is_main, batches.names, sink, batches.concepts
    )
    known_skips = len(metrics.skipped)
    saver = _Saver(run, state, method, metrics, processes, identity, contract)

    def view(last: bool | None = None) -> View:
        last = state.step == config.train.total_steps if last is None else last
        return View(state.step, last, transformer, method, exported_weights(state), metrics.last)

    guard = saver.saving_when_interrupted() if save_when_interrupted else contextlib.nullcontext()
    with _progress_bar(config, state.step, processes) as bar, guard:
        for callback in callbacks:
            callback(view())
        while state.step < config.train.total_steps and not ended():
            result = train_step(state, transformer, method, batches, objective, config, processes.reduce_mean)
            metrics.add(state.step, result, stop_requested())
            saver.measured = state.step
            last = state.step == config.train.total_steps
            alone = processes.world == 1 and stop_requested()  # several processes agree on a stop when they log
            if state.step % config.train.log_every == 0 or last or alone:
                saver.read_metrics(wait=last or alone)
                _show(bar, metrics, known_skips)
                known_skips = len(metrics.skipped)
            bar.update()
            if metrics.skipped_in_a_row >= config.train.max_skipped:
                saver.save(keep=None)  # the last good weights; older checkpoints may be better, so keep all
                raise RunError(_not_finite(run, metrics))
            if state.step % config.checkpoint.every == 0 or last or metrics.stop_requested:
                saver.save(config.checkpoint.keep)
            metrics.check_place()
            for callback in callbacks:
                callback(view())
            if metrics.stop_requested and not last:
                raise KeyboardInterrupt
        if state.step < config.train.total_steps:
            if saver.saved < state.step:
                saver.save(config.checkpoint.keep)
            for callback in callbacks:
                callback(view(last=True))
    if processes.is_main:
        prune(run, config.checkpoint.keep)  # an earlier attempt may have ended before it could prune
    return metrics


class _Saver:
    """Writes the checkpoints of a run, and tracks which step can be saved and continued."""

    def __init__(
        self,
        run: Path,
        state: TrainState,
        method: Method,
        metrics: Metrics,
        processes: Processes,
        identity: Mapping[str, Any],
        contract: Mapping[str, Any],
    ) -> None:
        self.run, self.state, self.method, self.metrics = run, state, method, metrics
        self.processes, self.identity, self.contract = processes, identity, contract
        self.saved = self.measured = state.step
        """The last step in a checkpoint, and the last step in the metrics."""
        self._known_skips = len(metrics.skipped)

    def save(self, keep: int | None) -> None:
        """Write a checkpoint of the current step, and remove all but the newest `keep`; None keeps all."""
        self.read_metrics(wait=True)
        what = (self.run, self.state, self.identity, keep, self._export)
        if self.state.master.is_sharded:
            save_sharded_checkpoint(*what, self.processes)
        elif self.processes.is_main:
            save_checkpoint(*what)
        self.saved = self.state.step
        self.processes.wait()

    def _export(self, folder: Path) -> None:
        product = folder / self.method.product.name
        export_weights(self.method, product, exported_weights(self.state), self.contract, self.processes)

    def read_metrics(self, wait: bool) -> None:
        """Read the metrics of past steps. Raise RunError if the weights hold a gradient that was not finite."""
        self.metrics.flush(wait=wait)
        new = list(self.metrics.skipped.items())[self._known_skips :]
        if self.state.fused is not None and new:
            raise RunError(_spoilt(self.run, *new[0]))

    @contextlib.contextmanager
    def saving_when_interrupted(self) -> Iterator[None]:
        """Save the last complete step on KeyboardInterrupt, unless it cut off an update or several processes train."""
        try:
            yield
        except KeyboardInterrupt:
            step = self.state.step
            is_complete = not self.state.updating and self.measured == step
            if is_complete and self.saved < step and self.processes.world == 1:
                self.save(keep=None)
            raise


def exported_weights(state: TrainState) -> Mapping[str, Tensor]:
    """Return the weights to export and preview: the EMA if there is one, else the optimizer's result."""
    return state.master.named(state.result() if state.ema is None else state.ema)


def export_weights(
    method: Method, folder: Path, weights: Mapping[str, Tensor], contract: Mapping[str, Any], processes: Processes
) -> None:
    """Write the product on the main process. Call it on all processes if they divide the trained parameters."""
    if processes.is_main:
        method.export(folder, weights, contract)
        return
    for _ in weights.values():  # takes part in gathering it
        pass


def _progress_bar(config: Config, step: int, processes: Processes) -> Bar:
    return progress_bar(
        total=config.train.total_steps,
        initial=step,
        desc=config.name,
        unit="step",
        disable=not processes.is_main,
        dynamic_ncols=True,
    )


def _show(bar: Bar, metrics: Metrics, known_skips: int) -> None:
    for step, suspects in list(metrics.skipped.items())[known_skips:]:
        say(f"warning: step {step} was skipped, its gradient is not finite: {_enumerated(suspects)}")
    last = metrics.last
    if last:
        loss = "skipped" if last["loss"] is None else f"{last['loss']:.4f}"
        bar.set_postfix(loss=loss, lr=f"{last['lr']:.1e}", refresh=False)


def _not_finite(run: Path, metrics: Metrics) -> str:
    step, suspects = list(metrics.skipped.items())[-1]
    return (
        f"{run}: stopped at step {step}: no finite gradient {metrics.skipped_in_a_row} times in a row, last "
        f"for {_enumerated(suspects)}; the last good weights are saved: check those images or lower optimizer.lr, then "
        "start again or, having deleted the newest checkpoints, go on with --resume"
    )


def _spoilt(run: Path, step: int, suspects: Sequence[str]) -> str:
    checkpoints = list_checkpoints(run)
    last = f"--resume goes on from {checkpoints[-1].name}" if checkpoints else "there is no checkpoint yet: start again"
    return (
        f"{run}: stopped at step {step}: the gradient is not finite, for {_enumerated(suspects)}, and with "
        f"train.fused_backward it cannot be skipped; check those images or lower optimizer.lr; {last}"
    )


def _enumerated(samples: Sequence[str]) -> str:
    return ", ".join(samples[:4]) + (f" and {len(samples) - 4} more" if len(samples) > 4 else "")
