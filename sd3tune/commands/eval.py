"""`sd3tune eval`: draw what is missing, measure all of it, compare the rows, and name the best weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from sd3tune.encode.resources import release
from sd3tune.errors import RunError
from sd3tune.evaluation.distances import distances
from sd3tune.evaluation.judge import judge
from sd3tune.evaluation.measuring import fetch_encoders, measure
from sd3tune.evaluation.photos import Photos, find_photos, find_subject
from sd3tune.evaluation.pictures import (
    BASE_ROW,
    PICTURES,
    Drawing,
    Picture,
    pictures_of,
    plan_drawings,
    seconds_each,
)
from sd3tune.evaluation.prompts import choose_prompts
from sd3tune.evaluation.report import Evaluation, Setting, values_of, write_files
from sd3tune.evaluation.request import EvalRequest
from sd3tune.evaluation.rows import RowName, rows_of
from sd3tune.evaluation.table import text_table
from sd3tune.evaluation.target import Target, Weights, find_target
from sd3tune.invocation import command_line
from sd3tune.measures.encoders import EncoderSpec, encoders_for
from sd3tune.measures.prompts import Prompts
from sd3tune.measures.subject import Subject
from sd3tune.model.base.offline import NANO, offline_kind
from sd3tune.publish.card.evaluated import EVAL_FOLDER
from sd3tune.reporting import Reporter, result, say, using
from sd3tune.run.card import refresh_card
from sd3tune.run.folder import holds_report
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.launch import report_errors_to_launcher
from sd3tune.runtime.processes import Processes, closing_process_group, processes_of


def run_eval(request: EvalRequest, *, dry_run: bool = False) -> Evaluation | None:
    """Evaluate, write the figures into the folder, and print the table.

    Pictures that are in the folder are not drawn again. Several processes divide the pictures to draw; the first one
    measures. Returns None in the others, and with `dry_run`, which only checks and prints a plan. Raises UserError.
    """
    with closing_process_group(), report_errors_to_launcher():
        accelerator = make_accelerator()
        processes = processes_of(accelerator)
        with nullcontext() if processes.is_main else using(Reporter(quiet=True)):
            with accelerator.main_process_first():  # it may build a base, or download one
                prepared = _prepare(request)
            if processes.is_main:
                _describe(request, prepared)
            if dry_run:
                say("dry run: nothing was drawn, measured or written")
                return None
            # Before the pictures, which may take an hour: a user who wants these figures can stop here.
            unavailable = fetch_encoders(prepared.specs) if processes.is_main else {}
            pictures = _draw(prepared, processes)
            release(accelerator.device)
            if not processes.is_main:
                return None
            return _measure(request, prepared, pictures, accelerator.device, unavailable)


def run_distances(first: Path, second: Path, encoders: Mapping[str, str]) -> None:
    """Print FID and KID between two folders of pictures. Raises UserError."""
    found = False
    for line, figures in distances(first, second, encoders, make_accelerator().device):
        result(line, **figures)
        found = True
    if not found:
        raise RunError("--fid: no encoder could be loaded; name a local folder with --encoder NAME=FOLDER")


@dataclass(frozen=True)
class _Prepared:
    """A checked evaluation."""

    target: Target
    photos: Photos
    subject: Subject
    specs: Sequence[EncoderSpec]
    out: Path
    prompts: Prompts | None
    """None for a folder of pictures, which has no drawings either."""
    drawings: Sequence[Drawing]


def _prepare(request: EvalRequest) -> _Prepared:
    """Find and check everything that the evaluation needs, before anything large is loaded. Raises UserError."""
    request.check()
    target = find_target(request.target, request.checkpoints)
    photos = find_photos(request, target)
    subject = find_subject(request, target, photos)
    base = request.base or (target.config.model.base if target.config else target.contract.get("base", ""))
    specs = encoders_for(request.protocol, base, request.encoders)
    out = request.out or target.default_out
    if not target.weights:
        return _Prepared(target, photos, subject, specs, out, None, [])
    previews = target.config.preview.texts if target.config else []
    prompts = choose_prompts(request, subject, previews, offline_kind(base) == NANO)
    return _Prepared(target, photos, subject, specs, out, prompts, plan_drawings(request, target, prompts, out))


def _draw(prepared: _Prepared, processes: Processes) -> list[Picture]:
    """Return all pictures, after drawing the missing ones."""
    _make_folder(prepared.out)
    if prepared.target.pictures is not None:
        return pictures_of(prepared.target.pictures)
    return [picture for drawing in prepared.drawings for picture in drawing.draw(processes)]


def _measure(
    request: EvalRequest,
    prepared: _Prepared,
    pictures: Sequence[Picture],
    device: torch.device,
    unavailable: Mapping[str, str],
) -> Evaluation:
    """Measure the pictures, compare the rows, and write the files."""
    target, out = prepared.target, prepared.out
    setting = Setting(
        target.name, request.protocol, prepared.subject, prepared.prompts, prepared.photos, request.seeds,
        prepared.specs, _notes(prepared, pictures),
    )  # fmt: skip
    measured = measure(pictures, setting.photos, setting.specs, device, unavailable)
    names = _row_names(target, pictures)
    rows = rows_of(measured, names)
    verdict = judge(measured, names, rows[0], setting.subject.noun)
    evaluation = Evaluation(out, rows, verdict, values_of(setting, measured, rows, verdict))
    files = write_files(out, evaluation, setting, measured)
    _print(evaluation, files)
    if target.run is not None and out == target.run / EVAL_FOLDER and holds_report(target.run):
        problem = refresh_card(target.run)
        say(*([problem] if problem else []))
    if target.weights:
        say("", "next:", f"  {_next(target, evaluation)}")
    return evaluation


def _print(evaluation: Evaluation, files: Sequence[Path]) -> None:
    say("")
    for line in text_table(evaluation.rows):
        result(line)
    say(*(f"note: {note}" for note in evaluation.values["notes"]))
    say("")
    verdict = evaluation.verdict
    result(verdict.sentence, verdict=verdict.kind, best=verdict.best, folder=evaluation.folder)
    say("", *files)


def _describe(request: EvalRequest, prepared: _Prepared) -> None:
    """Print what will be drawn and measured."""
    photos, prompts, drawings = prepared.photos, prepared.prompts, prepared.drawings
    held_out = f", {_count(len(photos.held_out), 'held-out photo')}" if photos.held_out else ""
    say(f"photos    {_count(len(photos.training), 'photo')}{held_out}")
    if prepared.target.pictures is not None:
        say(f"pictures  {len(pictures_of(prepared.target.pictures))} in {prepared.target.pictures}")
    if prompts is not None:
        names = list(dict.fromkeys(one.picture.row for drawing in drawings for one in drawing.wanted))
        kinds = f"{_count(len(prompts.scored), 'prompt')} and {_count(len(prompts.of_class), 'class prompt')}"
        total = sum(len(drawing.wanted) for drawing in drawings)
        missing = sum(len(drawing.missing()) for drawing in drawings)
        say(f"rows      {', '.join(names)}")
        say(
            f"pictures  {kinds} x {_count(request.seeds, 'seed')} for each: {total}, of which {total - missing} are "
            f"there; in {prepared.out / PICTURES}"
        )
        seconds = seconds_each(prepared.target)
        if missing and seconds is not None:
            say(f"time      about {_duration(missing * seconds)} to draw, as long as the run's previews took")
    say(f"encoders  {', '.join(f'{spec.name} ({spec.label})' for spec in prepared.specs) or 'none'}")


def _notes(prepared: _Prepared, pictures: Sequence[Picture]) -> list[str]:
    """Return the rows, columns and prompts that are left out, with the reason."""
    subject, prompts, notes = prepared.subject, prepared.prompts, []
    if len(prepared.photos.training) == 1:
        notes.append("there is one photo, so there is no row of the photos among themselves")
    if prompts is None:
        return notes
    if not prompts.of_class:
        if subject.noun is None:
            why = "no class is known; give it with --class WORD, such as --class dog"
        elif subject.name is None:
            why = "the captions do not tell the subject from its class"
        else:
            why = "no class prompt is left that the training did not use"
        notes.append(f"no drift is measured: {why}")
    if not any(picture.row == BASE_ROW for picture in pictures):
        notes.append("there is no row of the base: a model from scratch has none, or it is not known here")
    if prompts.left_out:
        named = ", ".join(repr(text) for text in prompts.left_out[:3]) + ", ..." * (len(prompts.left_out) > 3)
        notes.append(f"not scored, as the training used them: {named}")
    return notes


def _row_names(target: Target, pictures: Sequence[Picture]) -> list[RowName]:
    if target.pictures is not None:
        return [RowName(pictures[0].row, "folder")]
    base = [RowName(BASE_ROW, "base")] if any(picture.row == BASE_ROW for picture in pictures) else []
    return [*base, *(RowName(weights.name, "trained", weights.step) for weights in target.weights)]


def _next(target: Target, evaluation: Evaluation) -> str:
    """Return the command that draws with the best weights."""
    weights = next((one for one in target.weights if one.name == evaluation.verdict.best), target.weights[-1])
    prompt = evaluation.values["prompts"][0]
    return command_line("sd3tune", "infer", *_arguments(weights), "--prompt", prompt)


def _arguments(weights: Weights) -> list[str]:
    return [weights.option, str(weights.path)]


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out: {out} cannot be made: {error.strerror}; choose another folder") from error


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"
