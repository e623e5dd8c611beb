"""`generate`: the images that `sd3tune infer` writes, for a program."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd3tune.adapter.file import write_adapter
from sd3tune.errors import AdapterError, ConfigError
from sd3tune.inference.generate import generate
from sd3tune.model.base.resolve import resolve_base
from tests.pictures import distance, opened

MODULE = "transformer_blocks.0.attn.to_q"


class Run(os.PathLike):
    """As a training returns it: a path to its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __fspath__(self) -> str:
        return str(self.folder)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter for `tiny` that shows."""
    folder = tmp_path_factory.mktemp("runs") / "dog"
    factors = {
        f"{MODULE}.lora_A": torch.ones(2, 64) / 8,
        f"{MODULE}.lora_B": torch.linspace(-1, 1, 128).reshape(64, 2),
    }
    base = {"base": "tiny", "base_kind": "tiny", "resolution": 32, "max_sequence_length": 16}
    write_adapter(folder / "adapter", factors, {**base, "encoders": ["clip_l", "clip_g", "t5"]})
    return folder


def pictures(folder: Path) -> list[Image.Image]:
    return [opened(path) for path in sorted(folder.glob("*.png")) if "before-after" not in path.name]


def test_the_images_are_those_of_infer_and_a_second_call_draws_them_again(
    run: Path, command, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    options = {"seed": 5, "num": 2, "steps": 2, "sampler": "heun"}
    images = generate("a dog", lora=Run(run), guidance=3.0, size=(48, 32), **options)
    again = generate(prompt="a dog", lora=[(str(run), 1)], guidance=3, size="48x32", **options)
    assert list(tmp_path.iterdir()) == [], "writes nothing"
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    command(
        "infer", "--lora", str(run), "--prompt", "a dog", "--seed", "5", "--num", "2", "--steps", "2",
        "--guidance", "3", "--size", "48x32", "--sampler", "heun", "--out", "out",
    )  # fmt: skip
    written = pictures(tmp_path / "out")
    assert [distance(one, other) for one, other in zip(images, written, strict=True)] == [0, 0]
    assert [distance(one, other) for one, other in zip(images, again, strict=True)] == [0, 0]
    assert distance(images[0], images[1]) > 4
    assert [image.info["sd3tune"] for image in images] == [image.info["sd3tune"] for image in written]
    assert json.loads(again[0].info["sd3tune"]) == json.loads(images[0].info["sd3tune"])


def test_adapters_have_weights_and_a_list_adds_them_up(run: Path) -> None:
    options = {"prompt": "a dog", "steps": 1}
    (half,), (text,) = generate(lora=(run, 0.5), **options), generate(lora=f"{run}@0.5", **options)
    (both,) = generate(lora=[Run(run), (Run(run), -0.5)], **options)
    (base,) = generate(base="tiny", t5_tokens=16, size=32, **options)
    assert distance(half, text) == 0
    assert distance(half, both) <= 1
    assert distance(half, base) > 4
    weights = [[lora["weight"] for lora in json.loads(image.info["sd3tune"])["loras"]] for image in (half, both)]
    assert weights == [[0.5], [1.0, -0.5]]


def test_prompt_files_grids_and_recipes_give_one_image_each_in_their_order(run: Path, tmp_path: Path, command) -> None:
    (tmp_path / "p.csv").write_text("prompt,steps\na cat,1\na dog,2\na cat,1\n")
    cat, dog, same = generate(lora=run, prompts=str(tmp_path / "p.csv"), batch=2)
    assert [json.loads(image.info["sd3tune"])["steps"] for image in (cat, dog, same)] == [1, 2, 1]
    assert distance(cat, same) == 0
    cells = generate("a dog", lora=run, steps=1, grid=["weight=0,1", "seed=3,4"])
    (alone,) = generate("a dog", lora=(run, 0), steps=1, seed=4)
    assert len(cells) == 4
    assert distance(cells[2], alone) == 0
    command("infer", "--lora", str(run), "--prompt", "a star", "--steps", "1", "--out", str(run / "out"))
    (again,) = generate(from_picture=run / "out" / "a-star-seed0.png")
    assert distance(again, pictures(run / "out")[0]) == 0


def test_a_run_that_trained_a_whole_model_is_a_base(tmp_path: Path) -> None:
    shutil.copytree(resolve_base("tiny").path, tmp_path / "run" / "model")
    (own,) = generate("a dog", base=Run(tmp_path / "run"), steps=1, size=32)
    (tiny,) = generate("a dog", base="tiny", steps=1, size=32)
    assert distance(own, tiny) == 0


def test_a_mistake_is_an_exception_with_the_line_of_the_command(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--steps 0: at least 1$"):
        generate("a dog", lora=run, steps=0)
    with pytest.raises(ConfigError, match=r"^give --prompt, the text to draw"):
        generate(lora=run)
    with pytest.raises(AdapterError, match="nowhere: no such file or folder"):
        generate("a dog", lora="nowhere")
