"""The model card of a run, which is a function of what lies in its folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3tune.adapter.file import ADAPTER_FILE, read_adapter
from sd3tune.config import Config, load_config
from sd3tune.config.run_folder import read_run_file
from sd3tune.files.atomic import write_text
from sd3tune.model.base.contract import CONTRACT_FILE
from sd3tune.publish.card import Drawing, Sample, Trained, card, is_unchanged
from sd3tune.publish.files import ADAPTERS, CARD, MODELS
from sd3tune.publish.previews import SAMPLES, SHEET
from sd3tune.run.previews import Preview, previews_of


def write_card(run: Path, config: Config, contract: Mapping[str, Any], run_facts: Mapping[str, Any]) -> bool:
    """Write `run/README.md` of a run that has ended; `run_facts` is what `run.json` is about to say.

    Return False, and write nothing, where somebody has changed the card, or a file of that name is no card.
    """
    if os.path.lexists(run / CARD) and not _is_unchanged_card(run / CARD):
        return False
    write_text(run / CARD, card_of(run, config, contract, run_facts, config.hub.repo_id))
    return True


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
    """The card in `repo_id`; None is the run's own folder. `step` is that of a checkpoint of a run that goes on."""
    samples = last_previews(run, config.preview.prompts)
    sheet = f"{SAMPLES}/{SHEET}" if samples and (run / SAMPLES / SHEET).is_file() else None
    return card(Trained(config, contract, run_facts, samples, sheet, repo_id, step))


def card_to_upload(run: Path, repo_id: str) -> bytes:
    """The run's card as it is for `repo_id`; one that somebody has changed as it lies there.

    It is told by being made again. Raises OSError when there is none.
    """
    written = (run / CARD).read_bytes()
    try:
        config = load_config(run / "config.yaml").config
        parts = (run, config, _contract_of(run), read_run_file(run))
        ours = card_of(*parts, config.hub.repo_id).encode()
    except Exception:  # of another version, or anything that somebody wrote into the files it is made of
        return written
    return card_of(*parts, repo_id).encode() if written == ours else written


def last_previews(run: Path, prompts: Sequence[str]) -> list[Sample]:
    """The last picture of each prompt, if one was drawn; in the order of the prompts."""
    last = {
        preview.number: preview
        for preview in previews_of(run)
        if preview.number < len(prompts) and preview.recipe["prompt"] == prompts[preview.number]
    }
    return [_sample(last[number]) for number in sorted(last)]


def _sample(preview: Preview) -> Sample:
    drawing = Drawing(**{name: preview.recipe[name] for name in ("prompt", "steps", "guidance", "seed")})
    return Sample(f"{SAMPLES}/{preview.path.name}", preview.step, drawing)


def _contract_of(run: Path) -> dict[str, Any]:
    if (run / ADAPTERS[0] / ADAPTER_FILE).is_file():
        return read_adapter(run).contract
    contract: dict[str, Any] = json.loads((run / MODELS[0] / CONTRACT_FILE).read_text(encoding="utf-8"))
    return contract
