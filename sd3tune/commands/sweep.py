"""`sd3tune sweep`: many trainings with other values of some keys, compared by one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sd3tune.config import Config, dump_config, load_config
from sd3tune.config.loader import load_text
from sd3tune.config.public import without_paths
from sd3tune.errors import ConfigError, RunError
from sd3tune.files.atomic import write_text
from sd3tune.invocation import command_line
from sd3tune.reporting import result, say
from sd3tune.runtime.signals import StopSignals
from sd3tune.sweep.settings import VALIDATION_LOSS, Range, Sweep, SweepFile, read_sweep

CONFIG = "train.yaml"
_LOCK = ".lock"
_MOST_CHECKED = 64
"""Trials whose configuration is checked before the first one runs."""


def run_sweep(path: Path, *, dry_run: bool = False, join: bool = False) -> None:
    """Work on a sweep until all trials have ended, and print the table, the best trial and the next command.

    A sweep that was stopped or killed continues. With `join`, help a process that is at work on it. Raises UserError.
    """
    file = read_sweep(path)
    _check_optuna()
    loaded = load_config(file.config)
    for note in loaded.notes:
        say(f"note: {note}")
    drawn = _checked(file, loaded.config)
    for line in _describe(file, loaded.config):
        say(line)
    if dry_run:
        _print_plan(file, loaded.config, drawn)
        return
    from sd3tune.sweep.results import table, write_results
    from sd3tune.sweep.trials import Trials
    from sd3tune.sweep.workers import carry_out

    with ExitStack() as stack:
        if not join:
            stack.enter_context(_alone(file))
        trials = Trials(file, _identity(file.settings, loaded.config), join=join)
        write_text(file.folder / CONFIG, dump_config(loaded.config))
        signals = stack.enter_context(StopSignals())
        stack.enter_context(signals.deferred())
        rows = carry_out(trials, file.folder / CONFIG, loaded.config.name, lambda: signals.asked)
    say("")
    for line in table(rows, file.settings):
        result(line)
    say("", *_finish(file, loaded.config, rows, write_results(file.folder, rows, file.settings)))


def _finish(file: SweepFile, config: Config, rows: Sequence[Any], results: Path) -> list[str]:
    """Write the page. Return the lines with the files and the next commands."""
    from sd3tune.sweep.attempt import best_weights
    from sd3tune.sweep.page import write_page
    from sd3tune.sweep.results import best_row

    lines = [f"results   {results}", f"page      {write_page(file.folder, rows, file.settings)}"]
    elsewhere = [row.name for row in rows if row.state == "running"]
    if elsewhere:
        lines.append(f"note: {', '.join(elsewhere)} still run on another machine; the same command adds them later")
    best = best_row(rows, file.settings)
    if best is None:
        return [*lines, "warning: no trial is complete, so there is no best one"]
    run = file.folder / best.name
    prompt = (config.preview.texts or ["PROMPT"])[0]
    weights = best_weights(run, file.settings, best.step)
    return [
        *lines,
        f"best      {best.name}: {' '.join(best.overrides)}",
        "",
        "next:",
        f"  {command_line('sd3tune', 'infer', '--lora', str(weights), '--prompt', prompt)}",
        f"  {command_line('sd3tune', 'report', str(run))}",
    ]


def _check_optuna() -> None:
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise RunError("sweep needs Optuna: pip install 'sd3tune[sweep]'") from None


def _checked(file: SweepFile, config: Config) -> list[tuple[str, ...]]:
    """Return the overrides of the first trials, whose configurations are checked. Raises ConfigError."""
    from sd3tune.sweep.trials import drawn_ahead

    if config.hub.push != "never":
        raise ConfigError(
            f"{file.at('config')}: hub.push is {config.hub.push}, and every trial would upload; set it to never, and "
            "push the best one with sd3tune hub push"
        )
    drawn, text, problems = drawn_ahead(file, _MOST_CHECKED), dump_config(config), dict[str, None]()
    for overrides in drawn:
        try:
            trial = load_text(text, str(file.config), overrides).config
        except ConfigError as error:
            problems |= dict.fromkeys(_at_axis(file, problem) for problem in error.problems)
        else:
            problems |= dict.fromkeys(_without_objective(file, trial))
    if problems:
        raise ConfigError(*problems)
    return drawn


def _at_axis(file: SweepFile, problem: str) -> str:
    """Return the problem of an override, at its axis in the sweep's file."""
    key = problem.removeprefix("override ").partition("=")[0]
    known = problem.startswith("override ") and key in file.settings.axes
    return f"{file.at('axes', key) if known else file.at('axes')}: {problem.removeprefix('override ')}"


def _without_objective(file: SweepFile, config: Config) -> list[str]:
    """Return a problem if a training does not measure the objective."""
    objective = file.settings.objective
    if objective == VALIDATION_LOSS and config.validation.holdout == 0:
        return [f"{file.at('objective')}: {objective} needs held-out images: set validation.holdout in {file.config}"]
    if objective != VALIDATION_LOSS and config.eval is None:
        return [f"{file.at('objective')}: {objective} is measured on pictures: set eval: {{}} in {file.config}"]
    return []


def _alone(file: SweepFile) -> FileLock:
    """Return the lock of a sweep's folder, held. Raises RunError if another process has it."""
    lock = FileLock(file.folder / _LOCK, blocking=False)
    try:
        file.folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(f"{file.folder}: another process works on this sweep; to help it, add --join") from None
    except OSError as error:
        raise RunError(f"{file.at('output_dir')}: {file.folder} cannot be used: {error.strerror}") from None
    return lock


def _identity(sweep: Sweep, config: Config) -> Mapping[str, Any]:
    """Return whatever decides the result of a trial. Moved files are the same ones."""
    trained = without_paths(config.model_dump(mode="json", exclude_defaults=True))
    return {
        "config": {key: value for key, value in trained.items() if key not in ("name", "output_dir")},
        "axes": [[key, axis] for key, axis in sweep.axes.items()],
        "sampler": sweep.sampler,
        "seed": sweep.seed,
        "objective": sweep.objective,
        "direction": "minimize" if sweep.minimises else "maximize",
    }


def _describe(file: SweepFile, config: Config) -> list[str]:
    sweep = file.settings
    at_once = f", {sweep.workers} at once" if sweep.workers > 1 else ""
    seed = f", seed {sweep.seed}" if sweep.sampler != "grid" else ""
    lines = [
        f"sweep     {sweep.count} trial{'s' * (sweep.count != 1)} of {file.config}: {sweep.sampler}{seed}{at_once}"
    ]
    lines += [f"axis      {key}: {_axis(axis)}" for key, axis in sweep.space.items()]
    which = "lowest" if sweep.minimises else "highest"
    pruned = "" if sweep.pruning is None else ", and trials below the median are stopped"
    return [*lines, f"objective {which} {sweep.objective}{pruned}", f"folder    {file.folder}"]


def _axis(axis: list[Any] | Range) -> str:
    if isinstance(axis, list):
        return ", ".join(json.dumps(value) for value in axis)
    steps = "" if axis.step is None else f" in steps of {axis.step:g}"
    return f"{axis.low:g} to {axis.high:g}{steps}" + ", log" * axis.log


def _print_plan(file: SweepFile, config: Config, drawn: Sequence[tuple[str, ...]]) -> None:
    """Print the trials, and the cost of the first one."""
    for number, overrides in enumerate(drawn):
        result(f"trial-{number:04d}  {' '.join(overrides)}", trial=number, overrides=list(overrides))
    if len(drawn) < file.settings.count:
        say(f"... and {file.settings.count - len(drawn)} more")
    if file.settings.sampler == "tpe":
        say("note: tpe learns from the finished trials: from the eleventh on, these values will differ")
    import torch

    from sd3tune.forecast.forecast import forecast, forecast_inputs
    from sd3tune.runtime.device import choose_dtype, gpu_of

    first = load_text(dump_config(config), str(file.config), drawn[0]).config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = forecast(forecast_inputs(first, choose_dtype(first.model.dtype, gpu_of(device))))
    steps = "" if first.train.steps is None else f", {first.train.steps} steps"
    say(
        f"cost      of trial-0000: {plan.needed / 1e9:.2f} GB of memory{steps} of {plan.flops / 1e12:.3g} TFLOP; for "
        "time on a card: sd3tune plan CONFIG --card NAME",
        "dry run: nothing was written",
    )
