"""Files that name an earlier version of nano `nano` still use its weights, as their fingerprint says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.inference.conditions import find_base
from sd3tune.inference.job import InferenceJob
from sd3tune.model.base import offline
from sd3tune.model.base.offline import EARLIER_NANOS, name_of_version
from sd3tune.model.base.resolve import resolve_base

WRITTEN = Path(__file__).parent / "written"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of an earlier version, in the working directory; today's nano has other weights."""
    other, here = tmp_path / "other", tmp_path / "here"
    shutil.copytree(offline.offline_folder("nano-1"), other)
    save_file({name: tensor * 0.5 for name, tensor in load_file(other / WEIGHTS).items()}, other / WEIGHTS)
    monkeypatch.setitem(offline._NANO_FOLDERS, "nano", other)
    shutil.copytree(WRITTEN, here)
    for file in [*here.rglob("*.json"), *here.rglob("*.yaml")]:
        file.write_text(file.read_text(encoding="utf-8").replace("{here}", str(here)), encoding="utf-8")
    monkeypatch.chdir(here)
    return here / "prediction"


def delta(run: Path) -> torch.Tensor:
    return torch.cat([(b @ a).flatten() for a, b in read_adapter(str(run)).folded().values()])


@pytest.mark.parametrize(("version", "fingerprint"), EARLIER_NANOS.items())
def test_each_earlier_version_has_the_weights_that_it_is_known_by(version: str, fingerprint: str) -> None:
    assert resolve_base(version).fingerprint("transformer") == fingerprint
    assert resolve_base(version).kind == "nano"


def test_only_a_file_of_an_earlier_version_means_that_version() -> None:
    for version, fingerprint in EARLIER_NANOS.items():
        assert name_of_version("nano", fingerprint) == version
        assert name_of_version("nano", "0" * 64) == name_of_version("nano", None) == "nano"
        assert name_of_version("tiny", fingerprint) == "tiny"


def test_its_run_resumes_with_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = delta(run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    shutil.rmtree(run / "adapter")
    run_training(load_config(run / "config.yaml").config, resume=True)
    assert "resuming from step-000002" in capsys.readouterr().out
    assert (delta(run) - expected).norm() < 1e-2 * expected.norm()
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["base"]["name"] == "nano-1"


def test_its_picture_is_drawn_again_with_them(run: Path) -> None:
    picture = run / "images" / "prediction.png"
    job = InferenceJob.from_fields(loras=[], prompt=None, from_picture=picture, out=run / "again", before=False)
    before, after = (np.asarray(Image.open(path), dtype=float) for path in (picture, run_infer(job)[0]))
    assert np.abs(before - after).mean() < 0.5  # of 255: another CPU rounds differently


def test_its_adapter_finds_them_unless_another_base_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = read_adapter(str(run))
    assert find_base(None, [adapter]).name == "nano-1"
    assert "differ" not in capsys.readouterr().out
    assert find_base("nano", [adapter]).name == "nano"
    assert "was trained on nano-1, whose weights differ from nano" in capsys.readouterr().out
