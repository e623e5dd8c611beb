"""`config new`: a preset's text with its comments, one's own name and data, ready to run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from sd3tune.commands.config_new import new_config
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.config.presets import SCHEMA_FILE, Preset, all_presets, find_preset, presets_folder
from sd3tune.errors import ConfigError

DREAMBOOTH = "dreambooth_sd35_medium"
each_preset = pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def comments(text: str) -> list[str]:
    return [line.partition("# ")[2].strip() for line in text.splitlines() if "# " in line]


@each_preset
def test_it_is_the_preset_with_its_comments_and_what_was_filled_in(preset: Preset, tmp_path: Path) -> None:
    out = new_config("rex", preset.name, data="photos/rex", caption="a photo of zwx cat: 'it'")
    assert out == Path("rex.yaml")
    made, shipped = load_config(out).config, load_config(preset.path).config
    assert made.name == "rex"
    assert made.output_dir == str(tmp_path / "runs" / "rex")
    assert made.data.sources[0].path == str(tmp_path / "photos" / "rex")
    assert made.data.sources[0].caption == "a photo of zwx cat: 'it'"
    for section in set(type(made).model_fields) - {"name", "output_dir", "data", "preview"}:
        assert getattr(made, section) == getattr(shipped, section), section
    assert made.data.model_copy(update={"sources": []}) == shipped.data.model_copy(update={"sources": []})
    text, original = out.read_text(), preset.path.read_text()
    assert len(comments(text)) == len(comments(original))
    assert text.startswith("# sd3tune train rex.yaml\n")
    assert "configs/" not in text.replace(str(presets_folder().as_uri()), "")


def test_prompts_that_quote_the_caption_follow_it() -> None:
    new_config("rex", DREAMBOOTH, caption="a photo of zwx cat")
    assert load_config("rex.yaml").config.preview.prompts == ["a photo of zwx cat on a beach"]


def test_comments_stay_in_their_column() -> None:
    new_config("a-much-longer-name", DREAMBOOTH, data="a", caption="a photo of my zwx")
    shipped = find_preset(DREAMBOOTH).read_text().splitlines()
    for old, new in zip(shipped, Path("a-much-longer-name.yaml").read_text().splitlines(), strict=True):
        assert new.startswith("#") or old.find(" #") == new.find(" #")


def test_the_reference_to_the_schema_leads_to_it() -> None:
    new_config("rex", DREAMBOOTH, out=Path("some/where/rex.yaml"))
    (line,) = [line for line in Path("some/where/rex.yaml").read_text().splitlines() if "$schema=" in line]
    uri = urlparse(line.partition("$schema=")[2])
    assert Path(unquote(uri.path)).samefile(presets_folder() / SCHEMA_FILE)


@pytest.mark.parametrize(
    ("data", "written"),
    [
        (None, "./dog"),
        ("photos", "../photos"),
        ("configs/photos", "./photos"),
        ("/abs/photos", "/abs/photos"),
        ("~/no: photos", "'~/no: photos'"),
    ],
)
def test_the_folder_is_relative_to_here_when_given_and_to_the_file_when_written(data: str | None, written: str) -> None:
    new_config("rex", DREAMBOOTH, data=data, out=Path("configs/rex.yaml"))
    assert f"- path: {written} " in Path("configs/rex.yaml").read_text()
    if data:
        found = load_config("configs/rex.yaml").config.data.sources[0].path
        assert found == os.path.abspath(os.path.expanduser(data))


def test_it_says_what_to_do_next(capsys: pytest.CaptureFixture[str], tiny_images: Path) -> None:
    new_config("rex", DREAMBOOTH, data="dog")
    said = capsys.readouterr().out
    assert said.startswith("rex.yaml: from the preset dreambooth_sd35_medium\n")
    assert "put the images into dog\n" in said
    assert "  sd3tune train rex.yaml\n" in said
    assert "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium" in said
    new_config("style", "sd35_medium_style", data=str(tiny_images))
    said = capsys.readouterr().out
    assert "put the images" not in said
    assert "caption" not in said, "there are captions beside the pictures"


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"name": "rex"}, "rex.yaml already exists and is not overwritten; choose another name, or --out"),
        ({"name": "my lora"}, "my lora.yaml:19: name: 'my lora' cannot name a folder"),
        ({"name": "x", "preset": "dreambooth"}, "no preset is called 'dreambooth'"),
        ({"name": "x", "out": Path("folder")}, "--out: folder is a folder; name a file in it, such as folder/run.yaml"),
        ({"name": "x", "out": Path("rex.yaml/x.yaml")}, "rex.yaml/x.yaml cannot be written: "),
        ({"name": "x", "data": ""}, "--data: is empty; name the folder of the images"),
        ({"name": "x", "data": "rex.yaml"}, "--data: rex.yaml is a file; name the folder of the images"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_leaves_nothing(arguments: dict[str, object], problem: str) -> None:
    Path("rex.yaml").write_text("mine")
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    with pytest.raises(ConfigError) as caught:
        new_config(**{"preset": DREAMBOOTH, **arguments})  # type: ignore[arg-type]
    (found,) = caught.value.problems
    assert found.startswith(problem)
    assert sorted(Path().rglob("*")) == before
    assert Path("rex.yaml").read_text() == "mine"


def test_what_it_writes_trains(tiny_images: Path) -> None:
    shutil.copytree(tiny_images, "photos")
    new_config("rex", "tiny_smoke", data="photos")
    overrides = ["train.steps=1", "preview.prompts=[]", "data.crop_variants=1", "data.flip=false"]
    run_training(load_config("rex.yaml", overrides).config)
    assert Path("runs/rex/adapter/pytorch_lora_weights.safetensors").exists()
