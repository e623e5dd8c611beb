"""The model card of a run, computed from the files in its folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3tune.adapter.embedding import EMBEDDING_FILE, read_embedding
from sd3tune.adapter.file import ADAPTER_FILE, read_adapter
from sd3tune.config import Config, load_config
from sd3tune.config.run_folder import read_run_file
from sd3tune.files.atomic import write_bytes
from sd3tune.files.json import NotJson
from sd3tune.files.own_json import read_object
from sd3tune.model.base.contract import CONTRACT_FILE
from sd3tune.publish.card import Drawing, Sample, Trained, card, is_unchanged
from sd3tune.publish.card.evaluated import EVAL_FILE, EVAL_FOLDER
from sd3tune.publish.files import ADAPTERS, CARD, EMBEDDINGS, MODELS
from sd3tune.publish.previews import SAMPLES, SHEET
from sd3tune.run.previews import Preview, previews_of


def write_card(run: Path, config: Config, contract: Mapping[str, Any], run_facts: Mapping[str, Any]) -> str | None:
    """Write `run/README.md` of a run that has ended; `run_facts` is the content that `run.json` will get.

    Return None, or a line with the reason why none was written: the existing file was edited or is not a card, or the
    card cannot be made. The run is complete without one. Raises OSError if it cannot be saved.
    """
    if os.path.lexists(run / CARD) and not _is_unchanged_card(run / CARD):
        return f"note: {run / CARD} was edited by hand and is kept; no model card was written"
    try:
        page = card_of(run, config, contract, run_facts, config.hub.repo_id).encode()
    except Exception as error:  # of any kind: a trained adapter must not be lost for a page about it
        reason = " ".join(str(error).split())
        return (
            f"warning: no model card was written: {type(error).__name__}: {reason}; the run is complete without one: "
            f"write {run / CARD} by hand, and report this"
        )
    write_bytes(run / CARD, page)
    return None


def refresh_card(run: Path) -> str | None:
    """Write the card of a finished run again, after an evaluation; see `write_card`. Raises UserError and OSError."""
    return write_card(run, load_config(run / "config.yaml").config, written_contract(run), read_run_file(run))


def _is_unchanged_card(path: Path) -> bool:
    try:
        return not path.is_symlink() and is_unchanged(path.read_bytes().decode())
    except (OSError, ValueError):
        return False


def card_of(
    run: Path,
    config: Config,
    contract: Mapping[str, Any],
    run_facts: Mapping[str, Any],
    repo_id: str | None,
    step: int | None = None,
) -> str:
    """Return the card for `repo_id`, or for the run folder if None. `step` marks a checkpoint of an unfinished run."""
    samples = last_previews(run, config.preview.texts)
    sheet = f"{SAMPLES}/{SHEET}" if samples and (run / SAMPLES / SHEET).is_file() else None
    evaluation = evaluation_of(run) if step is None else None
    return card(Trained(config, contract, run_facts, samples, sheet, repo_id, step, evaluation))


def card_to_upload(run: Path, repo_id: str) -> bytes:
    """Return the run's card for `repo_id`; an edited card is returned unchanged.

    Manual edits are detected by regenerating the card. Raises OSError if there is none.
    """
    written = (run / CARD).read_bytes()
    try:
        config = load_config(run / "config.yaml").config
        parts = (run, config, written_contract(run), read_run_file(run))
        ours = card_of(*parts, config.hub.repo_id).encode()
    except Exception:  # written by another version, or a source file was edited
        return written
    return card_of(*parts, repo_id).encode() if written == ours else written


def last_previews(run: Path, prompts: Sequence[str]) -> list[Sample]:
    """Return the last preview of each prompt that has one, in the order of the prompts."""
    last = {
        preview.number: preview
        for preview in previews_of(run)
        if preview.number < len(prompts) and preview.recipe["prompt"] == prompts[preview.number]
    }
    return [_sample(last[number]) for number in sorted(last)]


def _sample(preview: Preview) -> Sample:
    names = ("prompt", "steps", "guidance", "seed", "negative", "size", "slg")
    drawing = Drawing(**{name: preview.recipe[name] for name in names if name in preview.recipe})
    return Sample(f"{SAMPLES}/{preview.path.name}", preview.step, drawing)


def written_contract(run: Path) -> dict[str, Any]:
    """Return the contract of the weights in a run folder or a checkpoint. Raises UserError, OSError and NotJson."""
    if (run / ADAPTERS[0] / ADAPTER_FILE).is_file():
        return read_adapter(run).contract
    if (run / EMBEDDINGS[0] / EMBEDDING_FILE).is_file():
        return dict(read_embedding(run).contract)
    return read_object(run / MODELS[0] / CONTRACT_FILE)


def evaluation_of(run: Path) -> dict[str, Any] | None:
    """Return the content of a run's `eval.json`; None without a readable one."""
    try:
        return read_object(run / EVAL_FOLDER / EVAL_FILE)
    except (OSError, NotJson):
        return None
