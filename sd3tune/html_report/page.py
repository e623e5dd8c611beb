"""The pages: `report_page` of one run, `comparison_page` of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sd3tune.config.dump import dump_values
from sd3tune.config.public import public_config, without_paths
from sd3tune.html_report.charts import charts_of, compared_charts
from sd3tune.html_report.data_sheet import data_sheet
from sd3tune.html_report.differences import differing_keys
from sd3tune.html_report.frame import rendered
from sd3tune.html_report.over_time import prompts_of, steps_of
from sd3tune.html_report.pictures import PICTURE_BYTES, Album
from sd3tune.html_report.read import RunFiles
from sd3tune.html_report.words import asked, environment, headline, key_figures
from sd3tune.publish.card import Trained
from sd3tune.publish.card.evaluated import evaluated_section
from sd3tune.publish.card.measured import measured_section
from sd3tune.publish.card.usage import usage_section
from sd3tune.training.metrics import relative_change


def report_page(run: RunFiles, photos: bool = True) -> str:
    """Return the page of one run. Without `photos`, it shows none of the training photos and captions."""
    album = Album()
    prompts = prompts_of(run, album)
    config = None if run.config is None else public_config(run.config)
    changed = None if run.config is None else without_paths(run.config.model_dump(mode="json", exclude_defaults=True))
    return rendered(
        "report.html.jinja",
        {
            "title": run.name,
            "state": run.summary.state,
            "headline": headline(run),
            "figures": key_figures(run),
            "notes": run.notes,
            "warnings": (run.facts.get("warnings") or []) if photos else [],  # they quote captions
            "asked": list(asked(run.config)) if run.config else [],
            "yaml": config and dump_values(config),
            "changed_yaml": changed and dump_values(changed),
            "charts": charts_of(run),
            "sigmas": list(_by_sigma(run)),
            "environment": list(environment(run)),
            "learned": _section(measured_section, run.trained) if "report" in run.facts else None,
            "evaluated": _evaluated(run),
            "usage": _section(usage_section, run.trained),
            "unfinished": run.trained.step if run.trained else None,
        },
        {"prompts": prompts, "steps": steps_of(prompts), "data": data_sheet(run, album, photos), "album": album},
    )


def comparison_page(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """Return a page that compares runs, which it calls `names`."""
    albums = [Album(PICTURE_BYTES // len(runs)) for _ in runs]
    pictures = [prompts_of(run, album, only_last=True) for run, album in zip(runs, albums, strict=True)]
    texts = dict.fromkeys((prompt.text, prompt.settings) for prompts in pictures for prompt in prompts)
    found = [{(prompt.text, prompt.settings): prompt for prompt in prompts} for prompts in pictures]
    return rendered(
        "comparison.html.jinja",
        {
            "title": " and ".join(names) if len(names) < 4 else f"{len(names)} runs",
            "names": names,
            "figures": [(run.summary.state, dict(key_figures(run))) for run in runs],
            "notes": [f"{name}: {note}" for name, run in zip(names, runs, strict=True) for note in run.notes],
            "charts": compared_charts(runs, names),
            "differing": differing_keys([None if run.config is None else public_config(run.config) for run in runs]),
        },
        {
            "rows": [(key, [of.get(key) for of in found]) for key in texts],
            "left_out": [sentence for album in albums if (sentence := album.sentence())],
        },
    )


def _section(section: Callable[[Trained], str | None], trained: Trained | None) -> str | None:
    """Return a section of the model card without its heading; None if the facts for it are missing or damaged."""
    try:
        text = None if trained is None else section(trained)
    except (AttributeError, LookupError, TypeError, ValueError):
        return None
    return text and text.partition("\n")[2].strip()


def _evaluated(run: RunFiles) -> str | None:
    if run.config is None or run.evaluation is None:
        return None
    return _section(evaluated_section, Trained(run.config, {}, run.facts, evaluation=run.evaluation))


def _by_sigma(run: RunFiles) -> Any:
    """Yield (range of sigma, base's loss, lowest loss, its step, change) of the held-out loss."""
    for name in run.validation[-1]["loss_by_sigma"] if run.validation else ():
        measured = [(line["loss_by_sigma"].get(name), line["step"]) for line in run.validation]
        finite = [(loss, step) for loss, step in measured if loss is not None]
        base = run.validation[-1]["base_loss_by_sigma"].get(name)
        if finite and base is not None:
            loss, step = min(finite)
            yield name, f"{base:.4f}", f"{loss:.4f}", str(step), relative_change(loss, base)
