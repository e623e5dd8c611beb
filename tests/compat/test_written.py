"""Files of an earlier version still work: `written/` holds what commit 3cdfac5 wrote on `tiny` and on `nano`.

`written/` has two finished runs with their checkpoints, the store that they share, and a picture drawn with each
adapter. `{here}` stands for the folder in which they were made. `lora` uses EMA, caption dropout and drawn class
images; `prediction` uses 8-bit AdamW, a noise offset and the base's own prediction as the prior.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.inference.job import InferenceJob

RUNS = {"lora": "step-000006", "prediction": "step-000004"}
"""Each run, and its last checkpoint."""
TEXT = {".json", ".jsonl", ".yaml"}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of `written/` whose paths lead into the copy; the working directory."""
    here = tmp_path / "here"
    shutil.copytree(Path(__file__).parent / "written", here)
    for file in here.rglob("*"):
        if file.suffix in TEXT:
            file.write_text(file.read_text(encoding="utf-8").replace("{here}", str(here)), encoding="utf-8")
    monkeypatch.chdir(here)
    return here


def delta(run: Path) -> torch.Tensor:
    """All weight changes of the run's adapter, flat, fp32."""
    return torch.cat([(b @ a).flatten() for a, b in read_adapter(str(run)).folded().values()])


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_from_its_checkpoint_to_the_same_adapter_without_encoding_anything(
    written: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = written / name
    expected = delta(run)
    shutil.rmtree(run / "checkpoints" / RUNS[name])
    shutil.rmtree(run / "adapter")
    run_training(load_config(run / "config.yaml").config, resume=True)
    printed = capsys.readouterr().out
    assert "resuming from step-" in printed
    assert "to encode" not in printed
    # Another CPU rounds differently, and 8-bit state amplifies it; without the noise offset it is 0.047.
    assert (delta(run) - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("name", RUNS)
def test_a_finished_run_is_finished(written: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_training(load_config(written / name / "config.yaml").config, resume=True)
    assert "already finished" in capsys.readouterr().out


@pytest.mark.parametrize("name", RUNS)
def test_a_picture_is_drawn_again_from_its_recipe(written: Path, name: str) -> None:
    picture = written / name / "images" / f"{name}.png"
    again = run_infer(
        InferenceJob.from_fields(loras=[], prompt=None, from_picture=picture, out=written / "again", before=False)
    )[0]
    before, after = (np.asarray(Image.open(path), dtype=float) for path in (picture, again))
    assert np.abs(before - after).mean() < 0.5  # of 255: another CPU rounds differently
