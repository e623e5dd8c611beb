"""The commands of each page are typed one after the other, in a folder that has what their reader has, and all work.

What a test cannot have is replaced: the gated models by `tiny`, thousands of steps by two.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd3tune.adapter.file import ADAPTER_FILE
from sd3tune.cli.main import app
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from tests.test_docs import PAGES, ROOT, commands_to_type, name_of
from tests.ui.process import served, text_of

MODELS = {
    "stabilityai/stable-diffusion-3.5-medium": "tiny",
    "model.base=stabilityai/stable-diffusion-3-medium-diffusers": "model.base=tiny",
    "model.base=stabilityai/stable-diffusion-3.5-large": "model.base=tiny",
    "PRESET": "sd35_medium_16gb",
    "runs/dreambooth-dog/checkpoints/step-000600": "runs/dreambooth-dog/checkpoints/step-000002",
}
"""What a reader has and a test has not -> what stands for it."""
SHORTER = {
    "train": ["model.base=tiny", "data.resolution=64", "train.steps=2", "train.batch_size=1",
              "train.gradient_accumulation=1", "preview.every=1", "preview.steps=1", "model.max_sequence_length=16",
              "schedule.warmup_steps=0"],
    "infer": ["--steps", "2", "--size", "64"],
    "plan": ["model.base=tiny", "data.resolution=64"],
}  # fmt: skip
ON_NANO = {"style", "textual_inversion", "pivotal", "kohya"}
"""Folders of examples whose commands run on nano, whose weights are trained, instead of tiny."""
NEEDS_THE_HUB = {"user/rex", "zalando-datasets/fashion_mnist"}
"""Tested against a Hub on this machine, in tests/run/test_upload.py and tests/data."""
NEEDS_HOURS = {"configs/nano_base.yaml", "configs/nano_long.yaml", "examples/fashion_mnist/fashion_mnist.yaml"}
"""And pictures that are drawn or downloaded first."""
TAKES_MINUTES = {"demo", "eval"}
"""Tested with fewer steps and pictures in tests/commands/test_demo.py and tests/evaluation."""

NEEDS_A_MODEL = {"caption", "mask"}
"""Tested with small models in tests/commands/test_data_caption.py and test_data_mask.py."""
NEEDS_SEVERAL_PROCESSES = {"--num-processes", "train.sharding=fsdp"}
"""Tested in tests/runtime."""
OWN_FILES = {"my.yaml", "my-sweep.yaml"}
"""Files that a page shows or leaves to its reader; tested in tests/run/test_streaming.py and tests/sweep."""
LEFT_OUT = NEEDS_SEVERAL_PROCESSES | OWN_FILES | NEEDS_THE_HUB | NEEDS_HOURS | TAKES_MINUTES | NEEDS_A_MODEL


def story(page: Path) -> list[list[str]]:
    return [words for _, words in commands_to_type(page) if not {*words} & LEFT_OUT]


def as_typed(words: list[str]) -> list[str]:
    """The run folder of what was typed, which a smaller base that stands in would change."""
    if words[0] != "train":
        return []
    settings = [word for word in words[2:] if "=" in word and not word.startswith("-")]
    return [f"output_dir={load_config(words[1], settings).config.output_dir}"]


TEXT_ENCODER = {
    f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{side}.weight": torch.ones(1, 1) for side in "AB"
}
"""What a downloaded file may hold besides."""
STORIES = [page for page in PAGES if story(page)]
IN_CHECK_LONG = {
    "docs/config.md", "docs/guides/cards.md", "docs/guides/face.md", "docs/guides/other-trainers.md",
    "docs/guides/products.md", "docs/guides/quick-start.md", "docs/guides/style.md", "docs/guides/subject.md",
    "docs/guides/two-subjects.md", "docs/inference.md", "docs/memory.md", "docs/textual-inversion.md",
    "docs/guides/notebook.md", "docs/results.md", "examples/two_subjects/README.md",
    "examples/dreambooth/README.md", "examples/kohya/README.md", "examples/masks/README.md",
    "examples/pivotal/README.md", "examples/style/README.md", "examples/textual_inversion/README.md",
}  # fmt: skip
"""Pages that take seconds and whose commands are tested elsewhere, too."""


@pytest.fixture(scope="module")
def trained(quick_config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints."""
    run = tmp_path_factory.mktemp("stories") / "rex"
    run_training(quick_config(run, "checkpoint.every=1", "train.steps=2"))
    return run


@pytest.fixture(scope="module")
def other_methods(quick_config, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, Path], object]:
    """`other_methods(page, folder)` adds the result of another method, for a page about that method."""

    def train(kind: str, *settings: str) -> Path:
        run = tmp_path_factory.mktemp("stories") / kind
        run_training(quick_config(run, f"method={{kind: {kind}}}", "train.steps=1", *settings))
        return run

    def add(page: Path, folder: Path) -> None:
        if page.name == "adapters.md":
            shutil.copy(train("dora") / "adapter" / ADAPTER_FILE, folder / "dog_dora.safetensors")
        if name_of(page) == "examples/kohya/README.md":
            mlp = "{targets: attention+mlp}"
            encoders = f"method.text_encoders={{clip_l: {mlp}, clip_g: {mlp}}}"
            theirs = train("lora", "model.base=nano", r"method.targets=re:transformer_blocks\..*", encoders)
            convert_lora(theirs, "kohya", folder / "kohya_dog.safetensors", with_picture=False)
        if page.name == "textual-inversion.md":
            learned = train("textual_inversion", "method.token=<rex>", "data.trigger=<rex>")
            shutil.copytree(learned, folder / "runs" / "rex")
            both = train("pivotal", "method.embedding.token=<rex>", "data.trigger=<rex>")
            shutil.copytree(both, folder / "runs" / "pivotal-rex")

    return add


@pytest.fixture
def readers_folder(trained: Path, tiny_images: Path, tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """Photos, a run, adapters and a file of prompts under the names that the pages use."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for folder in ("configs", "sd3tune"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for photos in ("photos/rex", "photos/dog", "photos/toy", "rex", "train/10_sks dog", "train/2_dog", "masked"):
        (tmp_path / photos).mkdir(parents=True)
        for picture in sorted(tiny_images.glob("*.png")):
            shutil.copy(picture, tmp_path / photos)
    for captioned in ("dog", "style"):
        shutil.copytree(tiny_images, captioned)
    for picture, ending in zip(sorted(Path("masked").glob("*.png"))[1:], ("_mask", "-masklabel"), strict=False):
        with Image.open(picture) as image:
            mask = Image.new("L", image.size, 0)
            mask.paste(255, (8, 8, 40, 72))
            mask.save(picture.with_stem(picture.stem + ending))
    for photo in ("rex.jpg", "yard.jpg"):
        shutil.copy(next(tiny_images.glob("*.png")), photo)
    with Image.open("yard.jpg") as yard:
        Image.new("L", yard.size, 255).save("yard-mask.png")
    for adapter in ("dog", "style"):
        shutil.copy(trained / "adapter" / ADAPTER_FILE, f"{adapter}.safetensors")
    save_file(load_file("dog.safetensors") | TEXT_ENCODER, "found.safetensors")
    (tmp_path / "prompts.csv").write_text("prompt,seed\na photo of sks dog,1\na dog,2\n")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.long] * (name_of(page) in IN_CHECK_LONG)) for page in STORIES],
    ids=[name_of(page) for page in STORIES],
)
def test_the_commands_of_a_page_work_one_after_the_other(
    page: Path, readers_folder: Path, trained: Path, other_methods: Callable[[Path, Path], object]
) -> None:
    words_of = [[MODELS.get(word, word) for word in words] for words in story(page)]
    other_methods(page, readers_folder)
    if not (readers_folder / "runs").exists() and not any(words[:2] == ["train", "rex.yaml"] for words in words_of):
        shutil.copytree(trained, readers_folder / "runs" / "rex")
    typed = set[frozenset[str]]()
    for words in words_of:
        shorter = SHORTER.get(words[0], [])
        if page.parent.name in ON_NANO:
            shorter = [word.replace("base=tiny", "base=nano") for word in shorter]
        whole = [*words, *shorter, *as_typed(words)]
        if frozenset(whole) in typed:  # in a test, what stands for another base is the same one
            continue
        typed.add(frozenset(whole))
        if page.name == "config.md":  # a list, not a story
            shutil.rmtree(readers_folder / "runs", ignore_errors=True)
        if words[0] == "ui":  # serves until it is ended
            with served(*words[1:]) as link:
                assert "New run" in text_of(link)
            continue
        app(whole, standalone_mode=False)
        if "--out" in words:
            assert Path(words[words.index("--out") + 1]).exists(), words
        elif words[0] == "infer":
            assert any(Path("images").glob("*.png")), words
    if Path("kohya_on.safetensors").exists():  # given back: the same layers, of which text encoders', changed
        given, back = (load_file(f"{name}.safetensors") for name in ("kohya_dog", "kohya_on"))
        assert given.keys() == back.keys()
        for prefix in ("lora_unet_", "lora_te1_", "lora_te2_"):
            assert any(not torch.equal(given[key], back[key]) for key in given if key.startswith(prefix))


def test_the_main_pages_are_among_them() -> None:
    assert {name_of(page) for page in STORIES} >= {
        "README.md", "docs/config.md", "docs/formats.md", "docs/inference.md", "examples/dreambooth/README.md",
        *(f"examples/{name}/README.md" for name in ON_NANO),
    }  # fmt: skip
    assert sum(len(story(page)) for page in STORIES) >= 30
