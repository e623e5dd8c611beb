"""`sd3tune report`: write a page about a run, or one that compares several."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from sd3tune import reporting
from sd3tune.errors import RunError
from sd3tune.files.atomic import write_text
from sd3tune.html_report.page import comparison_page, report_page
from sd3tune.html_report.read import read_run

REPORT, COMPARISON = "report.html", "comparison.html"


def run_report(runs: Sequence[Path], out: Path | None, photos: bool = True) -> None:
    """Write `RUN/report.html`, or for several runs `comparison.html` here. Raises RunError, before anything is written.

    Without `photos`, the page shows none of the training photos, their names and captions.
    """
    found = [read_run(run) for run in runs]
    target = out or (runs[0] / REPORT if len(runs) == 1 else Path(COMPARISON))
    if target.is_dir():
        raise RunError(f"--out: {target} is a folder; name the file to write, such as {target / REPORT}")
    page = report_page(found[0], photos) if len(found) == 1 else comparison_page(found, _names(runs))
    write_text(target, page.encode(errors="replace").decode())
    for run in found:
        for note in run.notes:
            reporting.say(f"note: {run.folder}: {note}")
    reporting.result(f"report    {target}", report=target, bytes=target.stat().st_size)


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the folders without the parents that all share, so that no two are equal. Raises RunError."""
    places = [os.path.realpath(run) for run in runs]
    if len(set(places)) < len(places):
        raise RunError("the same run is named twice; name each run once")
    shared = os.path.commonpath(places)
    return [os.path.relpath(place, shared) if place != shared else os.path.basename(place) for place in places]
