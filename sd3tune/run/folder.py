"""The run folder: its lock, its starting checkpoint, its clean-up, and `run.json`."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from filelock import FileLock, Timeout

from sd3tune.config.run_folder import (
    LAYOUT_VERSION,
    LOCK_FILE,
    MARKER,
    METRICS_FILE,
    RUN_FILE,
    VALIDATION_FILE,
    is_run_folder,
    read_run_file,
)
from sd3tune.encode.report import megabytes
from sd3tune.errors import RunError, UserError
from sd3tune.files.atomic import FULL, WriteError, is_temporary, remove_files, remove_unfinished, write_json
from sd3tune.files.own_json import is_whole_number, read_lines
from sd3tune.methods import products
from sd3tune.methods.base import Product
from sd3tune.publish.card.evaluated import EVAL_FOLDER
from sd3tune.publish.files import is_product_name
from sd3tune.publish.previews import SAMPLES, is_preview_name
from sd3tune.runtime.environment import continues, launch_names
from sd3tune.tracking.trackers import is_log
from sd3tune.training.checkpoint import list_checkpoints, read_state
from sd3tune.training.metrics import Line, problem_of_measurement, read_metrics

LOGS = "logs"
BEST = "best"
BEST_FILE, BEST_EVALUATED = "validation.json", "evaluation.json"
"""The measurement of the weights in `BEST`, by held-out loss or by `eval`."""
EVALUATIONS_FILE = "eval.jsonl"
MEASURED = "measured"
"""The folder, in a run's `EVAL_FOLDER`, of weights that were measured during training."""
MEASURED_PICTURES = "pictures"
"""The folder, in `MEASURED`, of the pictures that were measured."""
_LAUNCH = "launch"
"""Key in `run.json`: the launch that began the attempt, if its launcher restarts processes."""
_PICTURE = re.compile(r"(base|step-\d+)-(prompt|class)\d+-seed\d+\.png")

_OUTPUTS = (LOGS, SAMPLES, BEST, VALIDATION_FILE, EVALUATIONS_FILE, f"{EVAL_FOLDER}/{MEASURED}")
"""What an attempt measures and draws."""
_LONGEST_REASON = 500
"""Characters of an error that `run.json` keeps."""
_PROBED = 0.2
"""Seconds to wait for the lock: `listing.is_running` holds it for less than a millisecond."""


def starting_checkpoint(run: Path, resume: bool) -> Path | None:
    """Return the checkpoint to resume from; None for a fresh start.

    Raises RunError if the folder holds a run and `resume` is off, or holds files that a run would overwrite.
    """
    try:
        return _start_in(run, resume)
    except OSError as error:
        raise RunError(f"output_dir: {run} cannot be read: {error.strerror}; choose another output_dir") from None


def continues_launch(run: Path) -> bool:
    """Return whether a launcher has restarted this process to continue the run that it began in the folder."""
    return continues(read_run_file(run).get(_LAUNCH), os.environ)


def _start_in(run: Path, resume: bool) -> Path | None:
    _check_writable(run)
    if read_run_file(run).get(MARKER, 0) > LAYOUT_VERSION:
        raise RunError(f"{run}: written by a newer sd3tune; upgrade this one: pip install --upgrade sd3tune")
    checkpoints = list_checkpoints(run)
    if checkpoints and resume:
        if os.path.lexists(run / RUN_FILE) and not is_run_folder(run):
            raise RunError(
                f"{run / RUN_FILE}: damaged, or of another program; move it away to go on from the checkpoint"
            )
        read_metrics(run / METRICS_FILE)  # checked before anything is encoded, as users may edit them
        read_validation(run)
        read_evaluations(run)
        return checkpoints[-1]
    if checkpoints:
        step = read_state(checkpoints[-1])["step"]
        raise RunError(f"{run}: already holds a run (step {step}); add --resume to go on, or choose another output_dir")
    for product in products():
        if product.is_in(run):
            raise RunError(
                f"{run}: already holds {_with_article(product)} and no checkpoint; choose another output_dir"
            )
    found = {path.name for path in run.iterdir()} if run.is_dir() else set()
    inside = {name for name in found if not is_temporary(name)}
    if inside - {LOCK_FILE} and not is_run_folder(run):
        raise RunError(f"{run}: not empty and not a run folder; choose another output_dir")
    _check_clearable(run)
    return None


def _check_clearable(run: Path) -> None:
    """Raise RunError if a fresh start would have to remove links or files that no run wrote."""
    for path in (run / name for name in _OUTPUTS):
        if path.is_symlink():
            raise RunError(f"{path}: a link, and nothing is removed through links; remove it to start afresh here")
    for path in sorted((run / BEST).rglob("*")):
        if not (path.is_dir() or path.name.startswith(".") or _is_attempt_output(path.relative_to(run))):
            raise RunError(f"{path}: not written by the run, which replaces {BEST}/ as a whole; move it elsewhere")


def _with_article(product: Product) -> str:
    return f"{'an' if product.name[0] in 'aeiou' else 'a'} {product.name}"


def _check_writable(run: Path) -> None:
    """Raise RunError if the folder cannot be created or is not writable."""
    existing = next(path for path in (run, *run.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise RunError(f"output_dir: {existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise RunError(f"output_dir: {existing} cannot be written to; choose another output_dir")


def check_disk_space(run: Path, nbytes: int) -> None:
    """Raise RunError if the disk has less than `nbytes` free."""
    existing = next(path for path in (run, *run.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise RunError(
            f"{run}: checkpoints and results need {megabytes(nbytes)} and {megabytes(free)} are free; "
            "free some space or set output_dir to another disk"
        )


def check_still_newest(run: Path, start: Path | None) -> None:
    """Raise RunError if another process has trained here since `starting_checkpoint`; lock the folder first."""
    if list_checkpoints(run)[-1:] != ([start] if start else []):
        raise RunError(f"{run}: another process trained here a moment ago; run the command again")


def clear(run: Path, start: Path | None) -> None:
    """Remove unfinished files of a killed attempt and, if it saved no checkpoint, its measurements and previews.

    The next attempt may have other settings, so they would not belong to it. Links and the user's own files stay.
    """
    remove_unfinished(run)
    if start is None:
        remove_files(run, _is_attempt_output)


def _is_attempt_output(path: PurePath) -> bool:
    """Return whether a path in the run folder has the name of a log, preview or measurement."""
    folder, inside = path.parts[0], PurePath(*path.parts[1:])
    if not inside.parts:
        return folder in (VALIDATION_FILE, EVALUATIONS_FILE)
    if folder == LOGS:
        return is_log(inside)
    if folder == SAMPLES:
        return len(inside.parts) == 1 and is_preview_name(inside.name)
    if folder == BEST:
        return str(inside) in (BEST_FILE, BEST_EVALUATED) or is_product_name(inside)
    if folder == EVAL_FOLDER and inside.parts[0] == MEASURED and len(inside.parts) > 2:
        return _is_measured(inside.parts[1], PurePath(*inside.parts[2:]))
    return False


def _is_measured(folder: str, inside: PurePath) -> bool:
    if folder == MEASURED_PICTURES:
        return len(inside.parts) == 1 and _PICTURE.fullmatch(inside.name) is not None
    return re.fullmatch(r"step-\d+", folder) is not None and is_product_name(inside)


def read_validation(run: Path) -> list[Line]:
    """Return the run's held-out losses, oldest first. Raises RunError for a damaged file."""
    return read_lines(run / VALIDATION_FILE, _validation_problem)


def _validation_problem(line: Line) -> str | None:
    problem = problem_of_measurement(line, numbers=("images",), losses=("loss", "base_loss"))
    losses, of_base = line.get("loss_by_sigma"), line.get("base_loss_by_sigma")
    same_sigmas = isinstance(losses, dict) and isinstance(of_base, dict) and losses.keys() == of_base.keys()
    if problem is None and not same_sigmas:
        problem = "loss_by_sigma: not the losses of a run and of its base at the same sigmas"
    return problem


def read_evaluations(run: Path) -> list[Line]:
    """Return the lines of `eval.jsonl`, oldest first; see `evaluation.lines`. Raises RunError for a damaged file."""
    return read_lines(run / EVALUATIONS_FILE, _evaluation_problem)


def _evaluation_problem(line: Line) -> str | None:
    problem = problem_of_measurement(line, numbers=("likeness",), losses=("base_likeness", "photos_likeness", "drift"))
    unnamed = [name for name in ("setting", "encoder") if not isinstance(line.get(name), str)]
    return problem or (f"{unnamed[0]}: not text" if unnamed else None)


def is_finished(run: Path, product: Product, steps: int, patience: int | None = None) -> bool:
    """Return whether the run reached `steps`, or ended early by `patience` or less, and has a report.

    A product alone may be older than an extension.
    """
    checkpoints = list_checkpoints(run)
    step = int(read_state(checkpoints[-1])["step"]) if checkpoints else -1
    reached = step >= steps or _ended_early(run, step, patience)
    return reached and product.is_in(run) and holds_report(run)


def _ended_early(run: Path, step: int, patience: int | None) -> bool:
    """Return whether the run's last attempt ended at this step by `eval.patience`, which is no larger now."""
    ended = read_run_file(run).get("stopped_early")
    if patience is None or not isinstance(ended, dict) or ended.get("step") != step:
        return False
    return is_whole_number(ended.get("patience")) and patience <= ended["patience"]


def holds_report(run: Path) -> bool:
    """Return whether `run.json` has the closing report, which a run writes last."""
    return "report" in read_run_file(run)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Lock the run folder, created if missing. Raises RunError if another process holds the lock."""
    lock = FileLock(run / LOCK_FILE, timeout=_PROBED)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise RunError(f"{run}: another process is training here; wait for it or choose another output_dir") from None
    except OSError as error:
        raise RunError(f"output_dir: {run} cannot be written to: {error.strerror}; choose another") from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def explain_write_errors(run: Path) -> Iterator[None]:
    """Raise RunError in place of a WriteError in the run folder, with the last checkpoint and how to resume."""
    try:
        yield
    except WriteError as error:
        if not error.folder.is_relative_to(run):
            raise
        if not (run / RUN_FILE).exists():
            raise RunError(
                f"{run}: missing during training: moved, or its disk was unmounted; restore it, and run the "
                "same command with --resume to continue from its last checkpoint"
            ) from error
        saved = list_checkpoints(run)
        if not saved:
            raise
        full = isinstance(error.__cause__, OSError) and error.__cause__.errno in FULL
        way_out = "free some space" if full else "make it writable"
        raise RunError(
            f"{error.refusal}; {way_out}, and run the same command with --resume to continue from {saved[-1].name}"
        ) from error


@contextlib.contextmanager
def recording_end(run: Path) -> Iterator[None]:
    """Add `ended` to the `run.json` of an attempt that is stopped or fails: the `state`, and the `reason` in a line.

    A killed process leaves none, and the next attempt removes it. Nothing is written if it cannot be.
    """
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # MemoryError as well: nothing may hide the error itself
            described = read_run_file(run)
            if described and "report" not in described:
                state = "stopped" if isinstance(error, KeyboardInterrupt) else "failed"
                write_json(run / RUN_FILE, {**described, "ended": {"state": state, "reason": _reason(error)}})
        raise


def _reason(error: BaseException) -> str | None:
    """Return an error in one line; None for one that says nothing."""
    if isinstance(error, UserError):
        return error.problems[0]
    text = " ".join(str(error).split())[:_LONGEST_REASON]
    return f"{type(error).__name__}: {text}" if text else None


def describe_stopped(run: Path) -> str:
    """Return the message for a stopped run: its last checkpoint, and how to resume."""
    saved = list_checkpoints(run)
    if not saved:
        return f"{run}: stopped before the first checkpoint; encodings are kept: run the same command again"
    return f"{run}: stopped, saved at {saved[-1].name}; run the same command with --resume to continue"


def describe_run(run: Path, start: Mapping[str, Any], from_step: int) -> dict[str, Any]:
    """Write `run.json` at the start: `start`, the command and the commit. Return its content.

    The list of resumes is kept from earlier attempts.
    """
    resumes = [*_resumes(run), {"from_step": from_step}] if from_step else []
    launch = launch_names(os.environ)
    marked = {MARKER: LAYOUT_VERSION, **start, **({_LAUNCH: launch} if launch else {})}
    described = {**marked, "argv": sys.argv, "git_commit": _git_commit(), "resumes": resumes, "timings": {}}
    write_json(run / RUN_FILE, described)
    return described


def _resumes(run: Path) -> list[Any]:
    """Return the resumes of earlier attempts; empty if `run.json` cannot be read."""
    resumes = read_run_file(run).get("resumes", [])
    return resumes if isinstance(resumes, list) else []


def _git_commit() -> str | None:
    """Return the commit of this code, or None if git does not track it: the enclosing repository may be unrelated."""
    package = Path(__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    git = ["git", "-c", "core.fsmonitor=false", "-C", str(package)]

    def output_of(*command: str) -> str:
        done = subprocess.run([*git, *command], capture_output=True, text=True, timeout=5, check=True, env=environment)
        return done.stdout.strip()

    try:
        output_of("ls-files", "--error-unmatch", "__init__.py")
        return output_of("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
