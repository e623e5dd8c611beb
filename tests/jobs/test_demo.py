"""The demo: one command, one picture, and never at the cost of somebody's run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from sd3tune.cli.main import app
from sd3tune.config import dump_config, load_config
from sd3tune.errors import RunError
from sd3tune.jobs import demo
from sd3tune.jobs.demo import run_demo
from sd3tune.jobs.run_folder import LOCK_FILE, locked
from sd3tune.model.adapter_io import read_adapter


@pytest.fixture
def quick(monkeypatch) -> None:
    """The same demo at a tenth of the work."""
    monkeypatch.setitem(demo.CONFIG, "train", {"steps": 1})
    monkeypatch.setitem(demo.CONFIG, "data", {**demo.CONFIG["data"], "resolution": 32})
    monkeypatch.setattr(demo, "SIDE", 32)


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean difference of two pictures of one size, in levels of 0 to 255."""
    histogram = ImageChops.difference(one.convert("L"), other.convert("L")).histogram()
    return sum(level * count for level, count in enumerate(histogram)) / (one.width * one.height)


def test_the_demo_learns_changes_images_and_shows_it(tmp_path: Path, capsys, monkeypatch) -> None:
    """The whole of it, as `sd3tune demo` runs it."""
    out = tmp_path / "runs" / "demo"
    picture = run_demo(out)
    assert picture == out / "demo.png"
    assert len(read_adapter(out).factors) == 38
    losses = json.loads((out / "run.json").read_text())["report"]["fixed_noise_loss"]
    assert all(after < 0.9 * before for before, after in zip(losses["base"], losses["adapter"], strict=True))

    # A label and six pictures of 128 px that were trained on; below, a label above each column, then two such rows.
    shown, row = Image.open(picture), 28 + 128 + 8
    assert shown.size == (8 + 6 * 136, (8 + row) + (28 + 2 * row))
    tops = (8 + 28, 8 + row + 28 + 28, 8 + row + 28 + row + 28)
    for column in range(6):
        left = 8 + 136 * column
        trained, before, after = (shown.crop((left, top, left + 128, top + 128)) for top in tops)
        assert difference(trained, Image.open(demo._pictures()[column]).convert("RGB").resize((128, 128))) < 12
        assert difference(before, after) > 8
        assert all(len(part.convert("L").getcolors()) > 16 for part in (before, after))

    make, train = (shlex.split(line) for line in capsys.readouterr().out.splitlines()[-2:])
    monkeypatch.chdir(tmp_path)
    app(make[1:], standalone_mode=False)
    assert train[:2] == ["sd3tune", "train"]
    assert load_config(train[2]).config.data.sources[0].path == str(tmp_path / "dog")


def test_a_second_demo_replaces_the_first(tmp_path: Path, quick: None) -> None:
    out = tmp_path / "demo"
    run_demo(out)
    names = {path.name for path in (out / "images").iterdir()}
    (out / "left over").touch()
    run_demo(out)
    assert not (out / "left over").exists()
    assert {path.name for path in (out / "images").iterdir()} == names
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
    out.mkdir()
    text = "name: [demo" if broken else dump_config(quick_config(out, "name=demo"))
    (out / "config.yaml").write_text(text)
    refused(out)
    assert (out / "config.yaml").read_text() == text
