"""The results of an evaluation, and its files: `eval.json`, `eval.md`, and pictures to look at."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune import __version__
from sd3tune.evaluation.judge import Judgement, main_encoder
from sd3tune.evaluation.measuring import PIXELS, Measured
from sd3tune.evaluation.photos import Photos
from sd3tune.evaluation.pictures import Picture
from sd3tune.evaluation.rows import Row
from sd3tune.evaluation.table import markdown_table, text_table
from sd3tune.evaluation.views import checkpoints_sheet, drift_plot, nearest_sheet
from sd3tune.files.atomic import write_json, write_text
from sd3tune.files.png_recipe import save_png
from sd3tune.measures.encoders import EncoderSpec
from sd3tune.measures.intervals import Interval
from sd3tune.measures.prompts import Prompts
from sd3tune.measures.subject import Subject
from sd3tune.publish.card.evaluated import EVAL_FILE, EVAL_VERSION
from sd3tune.publish.card.markdown import code, table

PAGE = "eval.md"
_DIGITS = 6
"""Decimals in `eval.json`."""


@dataclass(frozen=True)
class Evaluation:
    """A finished evaluation."""

    folder: Path
    """The folder of its files and pictures."""
    rows: Sequence[Row]
    verdict: Judgement
    values: Mapping[str, Any]
    """The content of `eval.json`."""

    @property
    def table(self) -> list[dict[str, Any]]:
        """A dictionary for each row, ready for `pandas.DataFrame(evaluation.table)`."""
        return [
            {"row": row.name}
            | {f"{measure} {encoder}": figure.interval.mean for (measure, encoder), figure in row.figures.items()}
            for row in self.rows
        ]

    def __str__(self) -> str:
        return "\n".join([*text_table(self.rows), "", self.verdict.sentence])

    def _repr_html_(self) -> str:
        header, rows = markdown_table(self.rows)
        cells = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        titles = "".join(f"<th>{html.escape(title)}</th>" for title in header)
        return f"<table><tr>{titles}</tr>{cells}</table><p>{html.escape(self.verdict.sentence)}</p>"


@dataclass(frozen=True)
class Setting:
    """The inputs of an evaluation, for its report."""

    name: str
    protocol: str
    subject: Subject
    prompts: Prompts | None
    """None for a folder of pictures."""
    photos: Photos
    seeds: int
    specs: Sequence[EncoderSpec]
    notes: Sequence[str]
    """Rows and prompts that are left out, with the reason."""


def values_of(setting: Setting, measured: Measured, rows: Sequence[Row], verdict: Judgement) -> dict[str, Any]:
    """Return the content of `eval.json`, without times, so that equal evaluations write equal files."""
    prompts = setting.prompts
    encoders = [
        {"name": spec.name, "source": _public(spec.source), "revision": spec.revision, "measures": list(spec.measures)}
        | ({"unavailable": measured.unavailable[spec.name]} if spec.name in measured.unavailable else {})
        for spec in setting.specs
    ]
    return {
        "sd3tune_eval": EVAL_VERSION,
        "sd3tune": __version__,
        "name": setting.name,
        "protocol": setting.protocol,
        "subject": {"phrase": setting.subject.phrase, "class": setting.subject.noun},
        "prompts": [prompt.text for prompt in prompts.scored] if prompts else [],
        "class_prompts": [prompt.text for prompt in prompts.of_class] if prompts else [],
        "not_scored": list(prompts.left_out) if prompts else [],
        "seeds": setting.seeds,
        "photos": {"training": len(setting.photos.training), "held_out": len(setting.photos.held_out)},
        "encoders": encoders,
        "notes": list(setting.notes),
        "verdict": asdict(verdict),
        "rows": [_row(row) for row in rows],
        "pictures": [
            _picture(picture, index, measured, setting.photos) for index, picture in enumerate(measured.pictures)
        ],
    }


def write_files(out: Path, evaluation: Evaluation, setting: Setting, measured: Measured) -> list[Path]:
    """Write `eval.json`, `eval.md` and the pictures to look at, and return them. Raises OSError."""
    rows, written = evaluation.rows, [out / EVAL_FILE, out / PAGE]
    write_json(out / EVAL_FILE, evaluation.values)
    write_text(out / PAGE, _page(evaluation, setting, measured))
    encoder = main_encoder(measured) or PIXELS
    drawn = [row for row in rows if row.kind in ("trained", "folder")]
    sheets: dict[str, Image.Image | None] = {}
    shown = evaluation.verdict.best or drawn[-1].name
    sheets["nearest.png"] = nearest_sheet(measured, shown, setting.photos.training, encoder)
    if setting.prompts is not None:
        sheets["checkpoints.png"] = checkpoints_sheet(measured, rows)
        sheets["drift.png"] = drift_plot(rows, encoder)
    for name, sheet in sheets.items():
        if sheet is not None:
            save_png(sheet, out / name, "null")
            written.append(out / name)
    return written


def _row(row: Row) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    for (measure, encoder), figure in row.figures.items():
        entry = _interval(figure.interval)
        if figure.share is not None:
            entry["share"] = _number(figure.share)
        if figure.against_base is not None:
            entry["against_base"] = _interval(figure.against_base)
        figures.setdefault(encoder, {})[measure] = entry
    copies = {} if row.copies is None else {"copies": row.copies}
    return {"name": row.name, "kind": row.kind, "step": row.step, "pictures": row.pictures, **copies,
            "figures": figures}  # fmt: skip


def _picture(picture: Picture, index: int, measured: Measured, photos: Photos) -> dict[str, Any]:
    figures: dict[str, dict[str, Any]] = {}
    for (measure, encoder), value in measured.values[index].items():
        figures.setdefault(encoder, {})[measure] = _number(value)
    for encoder, of in figures.items():
        place = measured.nearest_photo.get((index, encoder))
        if place is not None:
            of["nearest_photo"] = photos.training[place].name
    named = {"file": picture.file.name, "row": picture.row, "kind": picture.kind, "prompt": picture.prompt}
    return {**named, "seed": picture.seed, "figures": figures}


def _interval(interval: Interval) -> dict[str, Any]:
    return {
        "mean": _number(interval.mean),
        "low": _number(interval.low),
        "high": _number(interval.high),
        "count": interval.count,
    }


def _number(value: float) -> float | None:
    return round(value, _DIGITS) + 0.0 if math.isfinite(value) else None


def _public(source: str) -> str:
    """Return a Hub id, or the last part of a folder."""
    return Path(source).expanduser().name if Path(source).expanduser().exists() else source


_READING = (
    ("likeness", "cosine to the training photos; the row of the photos is the most that can be expected"),
    ("share", "likeness as a share: 0 is the base, 1 the photos among themselves"),
    ("held out", "cosine to photos that were not trained on; well below the likeness means overfitting"),
    ("prompt", "cosine to the prompt, in which the class replaces the name"),
    ("diversity", "1 - cosine between pictures of one prompt; 0 if all are equal"),
    ("nearest", "cosine to the nearest training photo, or difference in pixels; like the photos' own or less"),
    ("class", "likeness of pictures whose prompt asks for the class alone; the base's is the least"),
    ("moved", "1 - cosine between such a picture and the base's at the same seed"),
)


def _page(evaluation: Evaluation, setting: Setting, measured: Measured) -> str:
    header, rows = markdown_table(evaluation.rows)
    used = {title.split(" by ")[0] for title in header}
    reading = [f"- **{title}**: {text}" for title, text in _READING if any(one.startswith(title) for one in used)]
    prompts = setting.prompts
    parts = [
        f"# Evaluation of {code(setting.name)}",
        evaluation.verdict.sentence,
        table(header, rows),
        "Mean (and 95 % interval) over prompts and seeds.",
        "\n".join(reading),
        *([_listed("Prompts", [prompt.text for prompt in prompts.scored])] if prompts else []),
        *(
            [_listed("Class prompts", [prompt.text for prompt in prompts.of_class])]
            if prompts and prompts.of_class
            else []
        ),
        *([_listed("Not scored, as the training used them", prompts.left_out)] if prompts and prompts.left_out else []),
        *(["## Left out\n\n" + "\n".join(f"- {note}" for note in setting.notes)] if setting.notes else []),
        "## Measured by\n\n" + "\n".join(_encoder(spec, measured) for spec in setting.specs),
    ]
    return "\n\n".join(parts) + "\n"


def _listed(title: str, texts: Sequence[str]) -> str:
    return f"## {title}\n\n" + "\n".join(f"- {code(text)}" for text in texts)


def _encoder(spec: EncoderSpec, measured: Measured) -> str:
    revision = f" at {code(spec.revision)}" if spec.revision else ""
    missing = measured.unavailable.get(spec.name)
    return f"- {spec.name}: {code(_public(spec.source))}{revision}" + (f" (not measured: {missing})" if missing else "")
