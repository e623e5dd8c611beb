"""`infer --grid`: one picture of many, and its single pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sd3tune.adapter.file import write_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.errors import ConfigError
from sd3tune.inference.grid import AXES, read_grid
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import InferenceJob
from sd3tune.sampling.contact_sheet import contact_sheet
from tests.pictures import distance, opened

Draw = Callable[..., list[Path]]
MODULE = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoints at steps 1 and 2."""
    folder = tmp_path_factory.mktemp("runs") / "dog" / "checkpoints"
    base = {"base": "tiny", "base_kind": "tiny", "resolution": 32, "max_sequence_length": 16}
    for step in (1, 2):
        factors = {
            f"{MODULE}.lora_A": torch.ones(2, 64) / 8,
            f"{MODULE}.lora_B": torch.linspace(-step, 1, 128).reshape(64, 2),
        }
        contract = {**base, "encoders": ["clip_l", "clip_g", "t5"]}
        write_adapter(folder / f"step-00000{step}", factors, contract)
    return folder


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    def draw(*loras: object, **options: object) -> list[Path]:
        given = {
            "prompt": "a dog",
            "out": tmp_path / "images",
            "steps": 1,
            "size": (32, 32),
            "before": False,
            **options,
        }
        return run_infer(InferenceJob.from_fields(loras=[str(lora) for lora in loras], **given))

    return draw


def test_columns_and_rows_are_the_pictures_of_single_calls(draw: Draw, checkpoints: Path, tmp_path: Path) -> None:
    adapter = checkpoints / "step-000002"
    *files, sheet = draw(adapter, grid=["weight=0,0.5", "seed=4,5"])
    assert [file.name for file in files] == [
        f"a-dog-seed{seed}-weight-{weight}.png" for seed in (4, 5) for weight in ("0", "0.5")
    ]
    alone = [
        draw(f"{adapter}@{weight}", seed=seed, out=tmp_path / "alone")[0] for seed in (4, 5) for weight in (0, 0.5)
    ]
    assert [distance(opened(one), opened(other)) for one, other in zip(files, alone, strict=True)] == [0] * 4
    images = [opened(path) for path in alone]
    labels = ["weight 0", "weight 0.5"], ["seed 4", "seed 5"]
    assert sheet.name == "a-dog-seed4-grid.png"
    assert distance(opened(sheet), contact_sheet([images[:2], images[2:]], *labels, side=128)) == 0
    assert distance(images[0], images[1]) > 4


def test_the_same_grid_again_draws_and_writes_nothing(draw: Draw, checkpoints: Path, tmp_path: Path, capsys) -> None:
    options = {"grid": ["seed=0,1"]}
    files = draw(checkpoints / "step-000001", **options)
    there = sorted((tmp_path / "images").iterdir())
    capsys.readouterr()
    assert draw(checkpoints / "step-000001", **options) == files
    assert sorted((tmp_path / "images").iterdir()) == there
    assert "0 drawn in" in capsys.readouterr().out
    *_, wider = draw(checkpoints / "step-000001", grid=["seed=0,1,2"])
    assert wider.name == "a-dog-seed0-grid-2.png"
    assert "1 drawn in" in capsys.readouterr().out


def test_the_checkpoints_of_a_run_are_an_axis(draw: Draw, checkpoints: Path, tmp_path: Path, monkeypatch) -> None:
    *files, _ = draw(grid=[f"lora={checkpoints}", "weight=1,-1"])
    steps = [f"step-00000{step}" for step in (1, 2)]
    assert [file.name for file in files[:2]] == [f"a-dog-seed0-lora-{step}-weight-1.png" for step in steps]
    alone = [draw(f"{checkpoints}/{step}@-1", out=tmp_path / "alone")[0] for step in steps]
    assert [distance(opened(one), opened(other)) for one, other in zip(files[2:], alone, strict=True)] == [0] * 2
    assert distance(opened(files[0]), opened(files[1])) > 4


def test_an_axis_stands_beside_an_adapter_that_stays(draw: Draw, checkpoints: Path, tmp_path: Path) -> None:
    stays, varies = checkpoints / "step-000001", checkpoints / "step-000002"
    *files, _ = draw(stays, grid=[f"lora={varies}", "weight=0.5"])
    (alone,) = draw(f"{varies}@0.5", stays, out=tmp_path / "alone")
    assert distance(opened(files[0]), opened(alone)) == 0


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("seed=3,4", [ImageRequest(seed=3), ImageRequest(seed=4)]),
        ("prompt=a dog, sitting|a cat", [ImageRequest(prompt="a dog, sitting"), ImageRequest(prompt="a cat")]),
        ("prompt=a,b", [ImageRequest(prompt="a"), ImageRequest(prompt="b")]),
        ("steps=4,8", [ImageRequest(steps=4), ImageRequest(steps=8)]),
        ("guidance=1,4.5", [ImageRequest(guidance=1.0), ImageRequest(guidance=4.5)]),
        ("sampler=euler,heun", [ImageRequest(sampler="euler"), ImageRequest(sampler="heun")]),
        ("shift=1,3", [ImageRequest(shift=1.0), ImageRequest(shift=3.0)]),
        ("slg=1,3", [ImageRequest(slg=1.0), ImageRequest(slg=3.0)]),
        ("strength=0.5,1", [ImageRequest(strength=0.5), ImageRequest(strength=1.0)]),
        ("weight=0,-1", [ImageRequest(loras=((0, 0.0),)), ImageRequest(loras=((0, -1.0),))]),
    ],
)
def test_an_axis_changes_its_field_of_the_request(axis: str, expected: list[ImageRequest]) -> None:
    first = ImageRequest(loras=((0, 1.0),)) if axis.startswith("weight") else ImageRequest()
    grid = read_grid([axis], ["x"])
    assert grid is not None
    ((*requests,),) = grid.requests(first)
    unnamed = [ImageRequest(**{**vars(request), "name": None}) for request in requests]
    assert unnamed == expected
    assert len({request.name for request in requests}) == len(requests)


def test_every_axis_is_tested_above() -> None:
    fields = {"seed", "prompt", "steps", "guidance", "sampler", "shift", "slg", "strength"}
    assert set(AXES) == {"weight", "lora", *fields}


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        (["wieght=1"], "--grid wieght: no such axis; did you mean 'weight'?"),
        (["x=1"], "--grid x: no such axis; one of weight, lora, prompt, seed"),
        (["seed"], "--grid seed: write NAME=VALUE,VALUE such as weight=0,0.5,1"),
        (["seed=1,,2"], "--grid seed=1,,2: write NAME=VALUE,VALUE"),
        (["seed=1,x"], "--grid seed=1,x: each value is a whole number"),
        (["seed=-1"], "--grid seed -1: at least 0"),
        (["weight=1,much"], "--grid weight=1,much: each value is a number"),
        (["weight=nan"], "--grid weight=nan: a finite number"),
        (["sampler=ddim"], "--grid sampler ddim: one of euler"),
        (["seed=1", "seed=2"], "--grid seed: given twice"),
        (["seed=1", "steps=2", "shift=3"], "--grid: 3 axes; a picture has 2"),
        (["lora=nothing/*"], "--grid lora=nothing/*: finds nothing"),
    ],
)
def test_a_mistake_is_one_line(axes: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_grid(axes, ["x"])
    (line,) = caught.value.problems
    assert line.startswith(said)


def test_what_does_not_go_with_a_grid_is_one_line(draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--grid weight: there is no adapter; give --lora$"):
        draw(base="tiny", grid=["weight=0,1"])
    with pytest.raises(ConfigError, match=r"^--num: not with --grid"):
        draw(base="tiny", grid=["seed=0,1"], num=2)
    with pytest.raises(ConfigError, match=r"^--prompts: not with --grid"):
        draw(base="tiny", prompt=None, grid=["seed=0,1"], prompts=tmp_path / "p.csv")
