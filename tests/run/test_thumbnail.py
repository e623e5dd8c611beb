"""The picture in an adapter's header: put there by `lora convert` and `hub push` alone."""

from __future__ import annotations

import base64
import io
import shutil
from pathlib import Path

import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd3tune.adapter.file import find_adapter, read_adapter
from sd3tune.cli.main import app
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.train import run_training
from sd3tune.errors import ConfigError, DataError
from sd3tune.run.thumbnail import thumbnail, with_metadata
from tests.pictures import distance

KEY = "modelspec.thumbnail"


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dog"
    looked = "preview={every: 1, prompts: [a dog, a cat], steps: 1, guidance: 1.0}"
    run_training(quick_config(run, looked, "train.steps=2", "checkpoint={every: 1, keep: 2}"))
    return run


def picture_in(file: Path) -> Image.Image | None:
    with safe_open(file, framework="pt") as opened:
        uri = opened.metadata().get(KEY)
    if uri is None:
        return None
    kind, data = uri.split(",")
    assert kind == "data:image/jpeg;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format == "JPEG"
    return image


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
@pytest.mark.parametrize(("where", "step"), [(".", 2), ("adapter", 2), ("checkpoints/step-000001", 1)])
def test_convert_takes_the_preview_that_the_weights_drew(
    form: str, where: str, step: int, run: Path, tmp_path: Path
) -> None:
    lines = convert_lora(run / where, form, tmp_path / "b.safetensors")
    preview = run / "samples" / f"step-{step:06d}-0.png"
    assert f"thumbnail: {preview}; --no-thumbnail leaves it out" in lines
    found = picture_in(tmp_path / "b.safetensors")
    assert found is not None
    other = run / "samples" / f"step-{3 - step:06d}-1.png"
    assert distance(found, Image.open(preview).convert("RGB")) < distance(found, Image.open(other).convert("RGB"))
    assert picture_in(find_adapter(run / where)) is None
    convert_lora(tmp_path / "b.safetensors", "diffusers", tmp_path / "c.safetensors")  # it is kept
    assert picture_in(tmp_path / "c.safetensors") is not None


def test_another_picture_or_none_is_asked_for(run: Path, tmp_path: Path) -> None:
    Image.new("RGBA", (640, 320), "red").save(tmp_path / "red.png")
    convert_lora(run, "kohya", tmp_path / "b.safetensors", tmp_path / "red.png")
    found = picture_in(tmp_path / "b.safetensors")
    assert found is not None
    assert found.size == (256, 128)
    convert_lora(tmp_path / "b.safetensors", "comfyui", tmp_path / "c.safetensors", with_picture=False)
    assert picture_in(tmp_path / "c.safetensors") is None
    shutil.copy(find_adapter(run), tmp_path / "lone.safetensors")
    assert len(convert_lora(tmp_path / "lone.safetensors", "diffusers", tmp_path / "d.safetensors")) == 1


def test_what_is_no_picture_is_named_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(DataError, match=r"a\.png: "):
        convert_lora(run, "kohya", tmp_path / "b.safetensors", tmp_path / "a.png")
    words = ["lora", "convert", str(run), "--to", "kohya", "--out", str(tmp_path / "b.safetensors")]
    with pytest.raises(ConfigError, match="leave one of the two out"):
        app([*words, "--thumbnail", str(tmp_path / "a.png"), "--no-thumbnail"], standalone_mode=False)
    assert not (tmp_path / "b.safetensors").exists()


def test_metadata_is_added_to_a_file_without_touching_its_tensors(run: Path, tmp_path: Path) -> None:
    more = {"key": "Hündchen"} | thumbnail(run / "samples" / "step-000002-0.png")
    content = with_metadata(find_adapter(run), more)
    assert content == with_metadata(find_adapter(run), more)
    (tmp_path / "b.safetensors").write_bytes(content)
    before, after = read_adapter(run), read_adapter(tmp_path / "b.safetensors")
    assert after.metadata == {**before.metadata, **more}
    assert load_file(tmp_path / "b.safetensors").keys() == load_file(find_adapter(run)).keys()
    assert content.endswith(find_adapter(run).read_bytes()[-4096:])
    save_file(load_file(find_adapter(run)), tmp_path / "bare.safetensors")
    (tmp_path / "c.safetensors").write_bytes(with_metadata(tmp_path / "bare.safetensors", more))
    assert read_adapter(tmp_path / "c.safetensors").metadata == more
