"""The GPU's benchmark on the CPU, with tiny shapes: its files, its budget, what goes wrong, and the bundle."""

from __future__ import annotations

import json
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import bundle, ceilings, measure, report
from benchmarks.gpu.cells import SHAPES, SIDES, Cell, cells_of
from benchmarks.gpu.device import Cpu
from benchmarks.gpu.run import main, measure_in_time
from benchmarks.gpu.sides import Example
from benchmarks.trainer import SD3_SCALING
from sd3tune.flow.objective import interpolate, velocity_target

TINY = SHAPES["tiny"]
CELL = Cell("sd3-medium", 32, 1)


def results() -> dict[str, Any]:
    figures = dict.fromkeys(("gemm_tflops", "copy_gbs", "attention_tflops", "attention_ms"), 1.0)
    return {"environment": report.environment(Cpu()), "ceilings": figures, "cells": [], "not_measured": []}


def test_a_run_on_the_cpu_measures_both_sides_and_writes_its_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--device", "cpu", "--cells", "1", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {"commit", "versions", "device", "cuda"} <= set(found["environment"])
    assert min(found["ceilings"].values()) > 0
    (row,) = found["cells"]
    for side in SIDES:
        of = row[side]
        assert of["outcome"] == "measured"
        assert of["images_per_s"] == pytest.approx(1 / of["step_s"])
        assert of["first_step_s"] > of["build_s"] > 0
        assert 10**6 < of["peak_bytes"] < 10**8
    assert row["sd3tune"]["kernels"] < row["example"]["kernels"]
    assert (tmp_path / "gpu.md").read_text() in capsys.readouterr().out
    assert not list(tmp_path.glob(".tmp*"))


def test_every_combination_is_there_and_full_sizes_come_first() -> None:
    cells = cells_of(SHAPES["full"])
    assert len(cells) == len(set(cells)) == 3 * 2 * 2 * 2 * 3
    assert cells[0] == Cell("sd35-medium", 1024, 1)


def test_what_does_not_fit_is_a_result_and_what_is_late_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Example:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(measure.SIDE_CLASSES, "example", full)  # type: ignore[arg-type]
    found, soon = results(), time.monotonic() + 60
    measure_in_time([CELL], TINY, Cpu(), soon, found, tmp_path)
    measure_in_time([CELL], TINY, Cpu(), time.monotonic(), found, tmp_path)
    (row,) = found["cells"]
    assert (row["example"], row["sd3tune"]["outcome"]) == ({"outcome": "out of memory"}, "measured")
    assert found["not_measured"] == [CELL.name]
    written = (tmp_path / "gpu.md").read_text()
    assert "| out of memory, " in written
    assert f"for want of time: {CELL.name}." in written


def test_a_ceiling_that_fails_loses_itself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(ceilings, "_attention", broken)
    found = results() | {"ceilings": ceilings.measure_ceilings(Cpu(), TINY)}
    assert found["ceilings"].keys() == {"gemm_tflops", "copy_gbs", "failed"}
    assert "GB/s, attention failed: RuntimeError: no kernel image." in report.table(found)


def test_selective_checkpointing_is_measured(tmp_path: Path) -> None:
    cell = next(cell for cell in cells_of(TINY) if cell.checkpointing == "selective" and cell.precision == "bf16")
    (row,) = [measure.measure_cell(cell, TINY, Cpu(), time.monotonic(), SIDES)]
    assert [row[side]["outcome"] for side in SIDES] == ["measured", "measured"]
    assert row["cell"].endswith("bf16, selective checkpointing")


def test_the_examples_step_has_the_loss_of_the_equations(tmp_path: Path) -> None:
    example = Example(CELL, TINY, torch.device("cpu"), tmp_path)
    torch.manual_seed(3)
    loss = example.step()
    example.transformer.disable_adapters()  # B was zero: the base's own velocity
    torch.manual_seed(3)
    draw = example.mean + example.std * torch.randn_like(example.mean)
    latents = (draw - SD3_SCALING.shift_factor) * SD3_SCALING.scaling_factor
    noise = torch.randn_like(latents.bfloat16()).float()
    schedule = example.scheduler
    index = int(torch.sigmoid(torch.normal(0.0, 1.0, (1,), device="cpu")).item() * len(schedule.timesteps))
    sigma = schedule.sigmas[index : index + 1]
    with torch.no_grad():
        (velocity,) = example.transformer.float()(
            hidden_states=interpolate(latents, noise, sigma),
            timestep=1000 * sigma,
            encoder_hidden_states=example.prompt_embeds.float(),
            pooled_projections=example.pooled.float(),
            return_dict=False,
        )
    expected = (velocity - velocity_target(latents, noise)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: torch sees no CUDA device")
    assert "--device cpu --shapes tiny" in line


def test_a_bundle_keeps_one_cuda_library_and_brings_only_what_is_missing(tmp_path: Path) -> None:
    wheels = {"bitsandbytes-9.9-py3-none-any.whl": ("cpu", "cuda128", "cuda130", "rocm72"), "absent_thing-1-x.whl": ()}
    for name, libraries in wheels.items():
        with zipfile.ZipFile(tmp_path / name, "w") as wheel:
            for library in libraries:
                wheel.writestr(f"bitsandbytes/libbitsandbytes_{library}.so", library)
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    slimmed = tmp_path / "bitsandbytes-9.9-py3-none-any.whl"
    bundle.strip(slimmed, bundle.CUDA_LIBRARY)
    left = {Path(name).name for name in zipfile.ZipFile(slimmed).namelist()}
    assert left == {"libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so", "__init__.py"}
    with pytest.raises(RuntimeError, match="no libbitsandbytes_cuda999"):
        bundle.strip(slimmed, "libbitsandbytes_cuda999.so")
    metadata.version("bitsandbytes")  # installed here
    assert list(bundle.unpacked(tmp_path, tmp_path / "place")) == ["absent_thing 1"]
    assert [path.name for path in (tmp_path / "place").iterdir()] == ["absent_thing"]


def test_the_bundle_has_the_tested_versions() -> None:
    """But for those that follow from the machine's PyTorch."""
    constraints = (Path(__file__).parents[2] / "constraints.txt").read_text().splitlines()
    tested = {line.split(";")[0].strip() for line in constraints}
    others = {wheel for wheel in bundle.WHEELS if wheel not in tested}
    assert {wheel.split("==")[0] for wheel in others} == {"torchao", "torchvision"}
