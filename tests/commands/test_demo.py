"""The demo: one command, one picture, and never at the cost of somebody's run."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from sd3tune.cli.main import app
from sd3tune.commands import demo
from sd3tune.commands.demo import OUTPUTS, run_demo
from sd3tune.config import dump_config, load_config
from sd3tune.config.run_folder import LOCK_FILE
from sd3tune.errors import RunError
from sd3tune.nano.oracle import read
from sd3tune.nano.world import SUBJECT
from sd3tune.run.folder import locked


@pytest.fixture
def quick(monkeypatch) -> None:
    """The same demo at a hundredth of the work."""
    monkeypatch.setitem(demo.CONFIG, "train", {"steps": 1, "batch_size": 2})
    monkeypatch.setattr(demo, "PRIOR", {**demo.PRIOR, "prompt": "a shape", "images": 2, "steps": 1})
    monkeypatch.setattr(demo, "SAMPLER", replace(demo.SAMPLER, steps=1))
    monkeypatch.setattr(demo, "COUNT", 6)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures of one size, in levels of 0 to 255."""
    histogram = ImageChops.difference(one.convert("L"), other.convert("L")).histogram()
    return sum(level * count for level, count in enumerate(histogram)) / (one.width * one.height)


def test_the_demo_learns_and_shows_it(tmp_path: Path, capsys, monkeypatch) -> None:
    """The whole of it, as `sd3tune demo` runs it, at a sixth of its steps, each three times as long.

    So a LoRA teaches a new shape, also in colours and on backgrounds that its pictures do not have.
    """
    monkeypatch.setitem(demo.CONFIG, "train", {**demo.CONFIG["train"], "steps": 40})
    monkeypatch.setitem(demo.CONFIG, "optimizer", {"lr": 3e-3})
    monkeypatch.setattr(demo, "PRIOR", {**demo.PRIOR, "images": 13})
    monkeypatch.setattr(demo, "COUNT", 6)
    out = tmp_path / "runs" / "demo"
    assert run_demo(out) == out / "demo.png"

    # Six rows of a label and six pictures of 128 px: trained on, the subject before and after, three of other shapes.
    shown, row = Image.open(out / "demo.png"), 28 + 128 + 8
    assert shown.size == (8 + 6 * 136, 8 + 6 * row)
    at = [[(8 + 136 * column, 8 + row * number + 28) for column in range(6)] for number in range(6)]
    cells = [[shown.crop((left, top, left + 128, top + 128)) for left, top in line] for line in at]
    for cell, trained in zip(cells[0], sorted(demo.PICTURES.glob("*.png")), strict=True):
        assert difference(cell, Image.open(trained).resize((128, 128), Image.Resampling.NEAREST)) < 1
    assert all(difference(before, after) > 3 for before, after in zip(cells[1], cells[2], strict=True))
    hearts = [[any(thing.shape == SUBJECT for thing in read(cell).things) for cell in line] for line in cells]
    assert sum(hearts[0]) == 6
    assert sum(hearts[1]) == 0
    assert sum(hearts[2]) >= 3

    lines = capsys.readouterr().out.splitlines()
    counts = [[int(word) for word in line.split()[-3:]] for line in lines if re.match(r"  (the|other) ", line)]
    assert counts[0][0] <= 1  # one circle of the base's is taken for a heart
    assert min(counts[0][1:]) >= 3  # half of them
    infer, make, train = (shlex.split(line) for line in lines[-3:])
    monkeypatch.chdir(tmp_path)
    app([*infer[1:], "--num", "1", "--steps", "2", "--out", "images"], standalone_mode=False)
    assert Image.open(next(Path("images").glob("an-orange-*-seed0.png"))).size == (64, 64)
    app(make[1:], standalone_mode=False)
    assert train[:2] == ["sd3tune", "train"]
    assert load_config(train[2]).config.data.sources[0].path == str(tmp_path / "dog")


@pytest.mark.long
def test_a_second_demo_replaces_the_first(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "demo"
    run_demo(out)
    (out / "alone" / "left over").touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (out / "mine").symlink_to(tmp_path / "elsewhere")
    (out / "with_prior").rename(out / "kept")
    (out / "with_prior").symlink_to(tmp_path / "elsewhere")
    run_demo(out)
    assert not (out / "alone" / "left over").exists()
    assert {path.name for path in out.iterdir()} == {*OUTPUTS, LOCK_FILE, "mine", "kept"}
    assert not (out / "with_prior").is_symlink()
    assert (tmp_path / "elsewhere" / "precious").exists()
    with pytest.raises(RunError, match="another process is training here"), locked(out):
        run_demo(out)
    assert (out / "demo.png").exists()


def test_an_empty_folder_and_one_where_nothing_came_of_it_are_used(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "run_training", lambda config: (_ for _ in ()).throw(RunError("came this far")))
    (tmp_path / "empty").mkdir()
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / LOCK_FILE).touch()
    for name in ("empty", "stopped", "new"):
        with pytest.raises(RunError, match="came this far"):
            run_demo(tmp_path / name)


def refused(out: Path) -> None:
    with pytest.raises(RunError, match=f"^--out: {out} exists and is not an earlier demo; choose another folder$"):
        run_demo(out)


def test_what_is_not_a_demo_is_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "rex.png").write_bytes(b"precious")
    refused(folder)
    refused(folder / "rex.png")
    assert (folder / "rex.png").read_bytes() == b"precious"


@pytest.mark.parametrize("broken", [False, True])
def test_somebodys_own_run_that_is_called_demo_is_left_alone(broken: bool, tmp_path: Path, quick_config) -> None:
    out = tmp_path / "demo"
    (out / "alone").mkdir(parents=True)
    text = "name: [demo" if broken else dump_config(quick_config(out, "name=demo"))
    (out / "alone" / "config.yaml").write_text(text)
    refused(out)
    assert (out / "alone" / "config.yaml").read_text() == text
