"""Rows of a page in words: what was asked for, how far the run is, and where it ran."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from sd3tune.config import Config
from sd3tune.html_report.privacy import shown_command
from sd3tune.html_report.read import RunFiles
from sd3tune.run.sizes import describe_sizes
from sd3tune.training.metrics import relative_change

Row = tuple[str, str]
_STATES = {
    "running": "is training now",
    "finished": "has finished",
    "stopped": "was stopped, and can be resumed",
    "failed": "ended with an error or was killed",
}


def headline(run: RunFiles) -> str:
    """Return the run's state in a sentence."""
    found = run.summary
    of = f"step {found.step}" if found.steps is None else f"step {found.step} of {found.steps}"
    reason = f": {found.reason}" if found.state == "failed" and found.reason else ""
    when = time.strftime("%d %B %Y, %H:%M", time.localtime(found.active))
    return f"This run {_STATES[found.state]}, at {of}{reason}. Last change: {when}."


def key_figures(run: RunFiles) -> list[tuple[str, Row]]:
    """Return (title, (figure, detail)) of the figures that a reader looks for first; a detail may be empty."""
    found, rows = run.summary, list[tuple[str, Row]]()
    rows.append(("steps", (f"{found.step}", "" if found.steps is None else f"of {found.steps}")))
    if run.validation and found.best_loss is not None:
        base = next(line["base_loss"] for line in run.validation if line["loss"] == found.best_loss)
        change = relative_change(found.best_loss, base)
        rows.append(("lowest held-out loss", (f"{found.best_loss:.4f}", f"at step {found.best_step}, {change}")))
    if (likeness := _last(run.evaluations, "likeness")) is not None:
        rows.append(("likeness", (f"{likeness:.3f}", "to the photos")))
    if (images := run.facts.get("images")) is not None:
        rows.append(("photos", (f"{images}", "")))
    seconds = _times(run).get("train_s")
    if seconds:
        rows.append(("training time", (duration(seconds), "")))
    return rows


def asked(config: Config) -> Iterator[Row]:
    """Yield what the configuration asks for."""
    data, train, method = config.data, config.train, config.method
    rank = getattr(method, "rank", None)
    yield "method", method.kind + (f", rank {rank}" if rank is not None else "")
    yield "base", config.model.base + (f", quantised to {config.model.quantize}" * (config.model.quantize != "none"))
    sources = ", ".join(str(source.path).rstrip("/").rpartition("/")[2] for source in data.sources)
    yield "data", f"{sources}, {describe_sizes(data)}" + ", aspect buckets" * data.buckets
    yield "trigger", data.trigger or "none"
    length = f"{train.epochs:g} epochs" if train.epochs is not None else f"{train.steps} steps"
    yield "length", f"{length} of {train.batch_size} x {train.gradient_accumulation} photos"
    yield "optimizer", f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.schedule.kind}"
    yield "noise", f"{config.flow.timesteps.kind}, shift {config.flow.shift}, weighting {config.flow.weighting.kind}"
    priors = [source.prior for source in data.sources if source.prior]
    yield "prior", ", ".join(prompt for prior in priors for prompt in prior.prompts) or "none"
    held_out = config.validation.holdout
    yield "held out", "nothing" if held_out == 0 else f"{held_out}, measured every {config.validation.every} steps"
    count = len(config.preview.texts)
    yield "previews", f"{count} prompts every {config.preview.every} steps" if count else "none"
    yield "checkpoints", f"every {config.checkpoint.every} steps, the last {config.checkpoint.keep} kept"
    yield "weights", "as trained" if config.ema is None else f"average (EMA {config.ema.decay:g})"


def environment(run: RunFiles) -> Iterator[Row]:
    """Yield where and with what the run was trained; nothing that names the machine or its user."""
    facts = run.facts
    if command := shown_command(facts.get("argv")):
        yield "command", command
    if device := facts.get("device"):
        yield "device", str(facts.get("gpu") or device)
    yield "precision", str(facts.get("dtype", "unknown"))
    if isinstance(world := facts.get("world_size"), int) and world > 1:
        yield "processes", str(world)
    versions = facts.get("versions")
    if isinstance(versions, Mapping):
        yield "versions", ", ".join(f"{name} {version}" for name, version in versions.items())
    if commit := facts.get("git_commit"):
        yield "commit of sd3tune", str(commit)
    yield "seed", str(facts.get("seed", "unknown"))
    if resumes := facts.get("resumes"):
        steps = [str(one.get("from_step")) for one in resumes if isinstance(one, Mapping)]
        yield "resumed from", f"step {', '.join(steps)}"
    times = [
        f"{name.removesuffix('_s').replace('_', ' ')} {duration(of)}" for name, of in _times(run).items() if of >= 1
    ]
    if times:
        yield "time", ", ".join(times)
    if skipped := facts.get("skipped_steps"):
        yield "skipped steps", ", ".join(map(str, skipped[:20])) + ", ..." * (len(skipped) > 20)


def duration(seconds: float) -> str:
    """Return `45 s`, `12 min` or `3 h 20 min`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def _times(run: RunFiles) -> dict[str, float]:
    timings = run.facts.get("timings")
    found = timings.items() if isinstance(timings, Mapping) else ()
    return {str(name): seconds for name, seconds in found if isinstance(seconds, int | float)}


def _last(lines: Any, name: str) -> float | None:
    return lines[-1].get(name) if lines else None
