"""The checks for a GPU on the CPU, where all paths are right, and with one that is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from diffusers import SD3Transformer2DModel

from benchmarks.gpu import checks
from benchmarks.gpu.check import main


def run(out: Path, *names: str, patch: pytest.MonkeyPatch) -> tuple[int, list[dict]]:
    patch.setattr(checks, "CHECKS", {name: checks.CHECKS[name] for name in names})
    code = main(["--device", "cpu", "--out", str(out)])
    return code, json.loads((out / "check.json").read_text())["findings"]


@pytest.mark.long
@pytest.mark.long
def test_on_the_cpu_all_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, found = run(tmp_path, *checks.CHECKS, patch=monkeypatch)
    assert code == 0
    assert all(one["passed"] for one in found)
    assert any(one["what"] == "nf4, fast: error of the gradient" for one in found)


def test_a_wrong_path_and_a_check_that_breaks_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: SD3Transformer2DModel) -> None:
        model.transformer_blocks[1].attn.to_q.base_layer.weight.data *= 1.01

    def broken(device: object, shapes: object, out: object) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(checks, "PATHS", {"wrong": [wrong]})
    monkeypatch.setattr(checks, "CHECKS", {**checks.CHECKS, "attention": broken})
    code, found = run(tmp_path, "paths", "attention", patch=monkeypatch)
    assert code == 1
    failed = [f"{one['what']} {one['note']}".strip() for one in found if not one["passed"]]
    assert failed[:2] == ["wrong, float32: error of the output", "wrong, float32: error of the gradient"]
    assert failed[-1] == "all failed: RuntimeError: no such kernel"
    assert "FAILED paths: wrong, float32: error of the output" in capsys.readouterr().out


def test_without_a_gpu_or_a_bundle_it_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: torch sees no CUDA device")
    assert main(["--bundle", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith(f"error: --bundle {tmp_path / 'none'}: no such folder")
