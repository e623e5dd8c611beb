"""The curves of a page, as JSON for its script: a chart has series, each with steps, values and a colour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd3tune.html_report.read import RunFiles
from sd3tune.training.metrics import Line

MOST_POINTS = 1000
"""Points of a curve; of a longer one, neighbours are averaged."""
_SMOOTHED = 25
"""The smoothed curve averages over this part of the run."""
Chart = dict[str, Any]
Points = Sequence[tuple[int, float | None]]


def charts_of(run: RunFiles) -> list[Chart]:
    """Return the charts of one run; those without measurements are left out."""
    loss, prior = (_points(run.metrics, name) for name in ("loss", "prior_loss"))
    held_out = [_series("held out", _points(run.validation, "loss"), 1)]
    held_out += [_series("base", _points(run.validation, "base_loss"), 2, "dashed")]
    return _drawn(
        _chart("Training loss", [_series("loss", loss, 1, "faint"), _series("smoothed", smoothed(loss), 1)],
               "Mean of the weighted loss in each step. It jumps, as each step draws other photos and noise."),
        _chart("Held-out loss", held_out, "On photos that are not trained on, at fixed noise."),
        _chart("Held-out loss by sigma", by_sigma(run.validation),
               "Change against the base in percent, by the share of noise: 0.8-1.0 decides the composition, 0.0-0.2 "
               "the finest detail."),
        _chart("Likeness of drawn pictures", _likeness(run.evaluations),
               "Cosine to the photos, measured on pictures drawn during training."),
        _chart("Prior loss", [_series("prior", prior, 3, "faint"), _series("smoothed", smoothed(prior), 3)],
               "On class images, which keep the rest of the class as it was."),
        _chart("Gradient norm", [_series("norm", _points(run.metrics, "grad_norm"), 3)], "Before clipping."),
        _chart("Learning rate", [_series("rate", _points(run.metrics, "lr"), 4)], ""),
    )  # fmt: skip


def compared_charts(runs: Sequence[RunFiles], names: Sequence[str]) -> list[Chart]:
    """Return the charts of several runs, each with a curve for each run."""
    numbered = list(enumerate(zip(names, runs, strict=True), 1))

    def of(lines: str, value: str) -> list[Chart]:
        return [_series(name, _points(getattr(run, lines), value), colour) for colour, (name, run) in numbered]

    losses = [_series(name, smoothed(_points(run.metrics, "loss")), colour) for colour, (name, run) in numbered]
    return _drawn(
        _chart("Held-out loss", of("validation", "loss"), "On photos that are not trained on, at fixed noise."),
        _chart("Training loss, smoothed", losses, "Comparable for runs with equal data and loss."),
        _chart("Likeness of drawn pictures", of("evaluations", "likeness"), "Cosine to the photos."),
        _chart("Gradient norm", of("metrics", "grad_norm"), "Before clipping."),
        _chart("Learning rate", of("metrics", "lr"), ""),
    )


def by_sigma(validation: Sequence[Line]) -> list[Chart]:
    """Return a series for each range of sigma: the change against the base in percent."""
    ranges = dict.fromkeys(name for line in validation for name in line["loss_by_sigma"])
    return [
        _series(f"sigma {name}", [(line["step"], _change(line, name)) for line in validation], colour)
        for colour, name in enumerate(sorted(ranges), 1)
    ]


def smoothed(points: Points) -> list[tuple[int, float | None]]:
    """Return an exponential moving average, corrected for its start."""
    decay = 1 - 1 / max(5.0, min(len(points), MOST_POINTS) / _SMOOTHED)
    total, weight, found = 0.0, 0.0, list[tuple[int, float | None]]()
    for step, value in thinned(points):
        if value is not None:
            total, weight = decay * total + (1 - decay) * value, decay * weight + 1 - decay
        found.append((step, total / weight if weight else None))
    return found


def thinned(points: Points) -> list[tuple[int, float | None]]:
    """Return at most `MOST_POINTS` points: the means of neighbours, at the last step of each group."""
    size = -(-len(points) // MOST_POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(group[-1][0], _mean(value for _, value in group if value is not None)) for group in groups]


def _change(line: Mapping[str, Any], name: str) -> float | None:
    loss, base = line["loss_by_sigma"].get(name), line["base_loss_by_sigma"].get(name)
    return None if loss is None or not base else 100 * (loss / base - 1)


def _likeness(lines: Sequence[Line]) -> list[Chart]:
    return [
        _series("likeness", _points(lines, "likeness"), 1),
        _series("base", _points(lines, "base_likeness"), 2, "dashed"),
        _series("photos", _points(lines, "photos_likeness"), 4, "dashed"),
        _series("class prompts", _points(lines, "drift"), 3),
    ]


def _points(lines: Sequence[Line], name: str) -> list[tuple[int, float | None]]:
    return [(line["step"], line[name]) for line in lines if name in line]


def _series(label: str, points: Points, colour: int, style: str = "line") -> Chart:
    """Return a series; `colour` counts from 1 and begins again after the sixth."""
    kept = thinned(points)
    return {
        "label": label,
        "x": [step for step, _ in kept],
        "y": [value if value is None else float(f"{value:.6g}") for _, value in kept],
        "colour": (colour - 1) % 6 + 1,
        "style": style,
    }


def _chart(title: str, series: Sequence[Chart], about: str) -> Chart:
    return {"title": title, "series": [one for one in series if any(y is not None for y in one["y"])], "about": about}


def _drawn(*charts: Chart) -> list[Chart]:
    return [chart for chart in charts if chart["series"]]


def _mean(values: Iterable[float]) -> float | None:
    kept = list(values)
    return sum(kept) / len(kept) if kept else None
