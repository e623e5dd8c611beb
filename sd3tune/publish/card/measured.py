"""The section on measurements: the report of `run.json`, in tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd3tune.publish.card.markdown import table
from sd3tune.publish.card.trained import Trained

DIVERGED = 0.75
"""Relative change of a denoising step above which a training that lowers no loss has diverged; see docs/results.md."""


def has_diverged(report: Mapping[str, Any], from_scratch: bool) -> bool:
    """Return whether a trained base was changed much, and predicts the training images no better than before.

    From scratch every change is fine, as the untrained model predicts zeros.
    """
    loss = report["fixed_noise_loss"]
    return not from_scratch and report["velocity_change"] > DIVERGED and sum(loss["trained"]) >= sum(loss["base"])


def measured_section(trained: Trained) -> str:
    return "\n\n".join(["## What was measured", *_measured(trained)])


def _measured(trained: Trained) -> list[str]:
    report = trained.report
    if report is None:
        return [
            f"Nothing yet: this is step {trained.steps} of {trained.config.train.total_steps} of an unfinished run."
        ]
    return [
        "The loss is the squared error of the predicted velocity, at fixed noise, of which sigma is the share. On "
        "images that were trained on, it shows that something was learned, not that it generalises:",
        _fixed_noise(report["fixed_noise_loss"], trained),
        *_held_out(report.get("held_out"), trained),
        *_evaluated(report.get("evaluation")),
        _changes(report, trained),
    ]


def _titles(trained: Trained) -> list[str]:
    """Return the titles of the two columns."""
    return ["base", "with the adapter"] if trained.is_adapter else ["untrained", "trained"]


def _fixed_noise(loss: Mapping[str, Any], trained: Trained) -> str:
    rows = zip(loss["sigma"], loss["base"], loss["trained"], strict=True)
    return table(["sigma", *_titles(trained)], ([f"{at:g}", _loss(base), _loss(after)] for at, base, after in rows))


def _held_out(measured: Mapping[str, Any] | None, trained: Trained) -> list[str]:
    """Return the held-out losses; empty without held-out images."""
    if not measured or measured["last"]["loss"] is None:
        return []
    last, best = measured["last"], measured["best"]
    of = "the image that was" if last["images"] == 1 else f"the {last['images']} images that were"
    rows = [
        (sigma, _loss(last["base_loss_by_sigma"][sigma]), _loss(loss)) for sigma, loss in last["loss_by_sigma"].items()
    ]
    mean = ("mean", _loss(last["base_loss"]), _loss(last["loss"]))
    lines = [f"On {of} not trained on:", table(["sigma", *_titles(trained)], [*rows, mean])]
    if best["step"] != last["step"]:
        lines.append(
            f"The lowest mean held-out loss was {_loss(best['loss'])}, at step {best['step']}. The step that draws "
            "best can be another."
        )
    return lines


def _evaluated(measured: Mapping[str, Any] | None) -> list[str]:
    """Return a line with the best measurement of `eval`; empty without one."""
    best = measured and measured["best"]
    if not best:
        return []
    photos, base = (
        "" if value is None else text.format(value)
        for text, value in (
            (", where the photos have {:.3f} among themselves", best["photos_likeness"]),
            (" and the base {:.3f}", best["base_likeness"]),
        )
    )
    return [
        f"Of the steps that were evaluated during training, step {best['step']} was best: likeness to the photos "
        f"{best['likeness']:.3f} by {best['encoder']}{photos}{base}."
    ]


def _changes(report: Mapping[str, Any], trained: Trained) -> str:
    """Return the measured change of one step and of each block."""
    step = f"One denoising step changes by {100 * report['velocity_change']:.3g} %."
    if has_diverged(report, trained.from_scratch):
        step += " **The loss on training images is no lower than the base's: the training has diverged.**"
    blocks = report.get("block_changes")
    if not blocks:
        return step
    measure = "The norm of the weight update" if trained.is_adapter else "The relative change of the weights"
    listed = ", ".join(f"{name.removeprefix('block ')}: {change:.3g}" for name, change in blocks.items())
    return f"{step} {measure} by block: {listed}."


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
