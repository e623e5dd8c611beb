"""Every shipped YAML trains: through the real loader, two steps on `tiny`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.model.base.resolve import resolve_base

CONTRACTS = {
    "lora": lambda run: read_adapter(run).contract,
    "full": lambda run: resolve_base(str(run / "model")).contract,
}
CONFIGS = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.long] * (path.stem == "nano_base")) for path in CONFIGS],
    ids=lambda path: path.stem,
)
def test_every_shipped_config_trains_on_tiny(path: Path, tiny_images: Path, tmp_path: Path) -> None:
    overrides = [
        "model.base=tiny",
        "data.sources.0.kind=folder",
        f"data.sources.0.path={tiny_images}",
        "data.resolution=64",
        "train.steps=2",
        "schedule.warmup_steps=0",
        "preview.steps=2",
        "validation.holdout=0",
        f"output_dir={tmp_path / 'run'}",
    ]
    config = load_config(path, overrides).config
    run_training(config)
    contract = CONTRACTS[config.method.kind](tmp_path / "run")
    assert contract["base"] == "tiny"
    assert contract["max_sequence_length"] == config.model.max_sequence_length
    assert contract["shift"] == config.flow.shift
    assert json.loads((tmp_path / "run" / "run.json").read_text())["report"]["changes_output"] is True
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "README.md").exists()
