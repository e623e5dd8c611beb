"""nano's CLIP: what captions state, how it is trained and written, and that the packaged one measures."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

import sd3tune
from examples.nano import resume, train_clip
from examples.nano.measure_clip import Clip, blurred, rank_correlation, similarity, warped
from examples.nano.scenes import any_scene
from examples.nano.statements import statement, with_a_wrong_word, with_fewer_words
from examples.nano.text_encoders import load_tokenizer, write_tokenizer
from sd3tune.nano.tasks import instances, subject_tasks
from sd3tune.nano.world import SUBJECTS, parse, render

SHIPPED = Path(sd3tune.__file__).parent / "assets" / "nano_clip"


def fits(caption: str, picture: str) -> bool:
    stated = [torch.tensor([statement(parse(text))]) for text in (caption, picture)]
    return bool(train_clip.fits(*stated).item())


@pytest.mark.parametrize(
    ("caption", "fitting"),
    [
        ("a shape", True),
        ("a red circle", True),
        ("a small striped red circle at the top on a blue background", True),
        ("a circle in outline style", False),
        ("a dotted red circle", False),
        ("a red square on a blue background", False),
        ("a red moon", False),
        ("a red circle above a yellow star", False),
        ("a large circle", False),
        ("a circle at the bottom", False),
    ],
)
def test_a_caption_fits_what_has_all_that_it_says(caption: str, fitting: bool) -> None:
    assert fits(caption, "a small striped red circle at the top on a blue background") is fitting


def test_captions_with_fewer_words_fit_and_with_a_wrong_word_do_not() -> None:
    chance = random.Random(0)
    for _ in range(300):
        scene = any_scene(chance)
        fewer, wrong = with_fewer_words(scene, chance), with_a_wrong_word(scene, chance)
        assert fits(fewer.caption, scene.caption)
        assert not fits(wrong.caption, scene.caption)
        assert parse(wrong.caption) == wrong


def test_the_loss_is_least_where_fitting_captions_are_near() -> None:
    fit = torch.tensor([[True, False, True, False], [False, True, False, False]])
    right = train_clip.loss_of(10.0 * fit, fit)
    assert right.item() == pytest.approx((0.5 * torch.tensor(2.0).log() + 1e-4).item() / 2, abs=1e-3)
    assert train_clip.loss_of(-10.0 * fit, fit) > 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer("clip_l", folder)
    return load_tokenizer("clip_l", folder)


def test_training_lowers_the_loss_and_continues_where_it_stopped(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = train_clip.Pictures(40, seed=0)

    def train(checkpoint: Path) -> tuple[CLIPModel, torch.Tensor]:
        torch.manual_seed(0)
        model = train_clip.new_clip(tokenizer)
        return model, train_clip.train(model, tokenizer, drawn, 16, 16, 0, checkpoint)

    monkeypatch.setattr(resume, "EVERY", 12)
    whole, losses = train(tmp_path / "state")
    assert losses[-3:].mean() < 0.93 * losses[:3].mean()
    continued, rest = train(tmp_path / "state")
    assert len(rest) == 4
    assert torch.equal(rest, losses[12:])
    assert all(torch.equal(a, b) for a, b in zip(continued.parameters(), whole.parameters(), strict=True))


def test_it_is_written_for_transformers(tokenizer: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = train_clip.new_clip(tokenizer).eval()
    train_clip.write(model, tokenizer, tmp_path / "clip")
    assert sum(file.stat().st_size for file in (tmp_path / "clip").iterdir()) < 1.3e6
    again, processor = CLIPModel.from_pretrained(tmp_path / "clip"), CLIPProcessor.from_pretrained(tmp_path / "clip")
    assert again.dtype == torch.float32
    scene = parse("a red moon on a blue background")
    picture = render(scene, 0)
    inputs = processor(text=[scene.caption], images=[picture], return_tensors="pt", padding=True)
    pixels = torch.tensor(list(picture.getdata())).reshape(64, 64, 3).permute(2, 0, 1)[None]
    assert torch.allclose(inputs["pixel_values"], train_clip.as_pixels(pixels), atol=1e-6)
    ours = model(input_ids=tokenizer([scene.caption], return_tensors="pt").input_ids, pixel_values=inputs.pixel_values)
    assert torch.allclose(again(**inputs).logits_per_image, ours.logits_per_image, atol=0.02)  # weights in fp16


def test_rank_correlation_of_known_cases() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2, 3], [5, 6, 7, 8]) == pytest.approx(0.9486833, abs=1e-6)  # scipy.stats.spearmanr


@pytest.fixture(scope="module")
def clip() -> Clip:
    if not SHIPPED.is_dir():
        pytest.skip("nano's CLIP is not packaged yet; python -m examples.nano.train_clip trains it")
    return Clip(SHIPPED)


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_packaged_clip_ranks_pictures_of_a_subject(clip: Clip, subject: str) -> None:
    photos = [render(scene, seed) for seed, scene in enumerate(instances(subject))]
    tasks = subject_tasks(6, 5, subject)
    pictures = [render(task.scene, task.seed) for task in tasks]
    others = [render(replace(task.scene, thing=replace(task.scene.thing, shape="circle")), task.seed) for task in tasks]
    right = similarity(clip, pictures, photos)
    assert right > 0.9
    assert right > similarity(clip, [warped(picture, 1, 0) for picture in pictures], photos)
    assert right > similarity(clip, [blurred(picture, 1, 0) for picture in pictures], photos)
    assert right > similarity(clip, others, photos) + 0.1


def test_the_packaged_clip_tells_right_captions_from_wrong_ones(clip: Clip) -> None:
    chance = random.Random(3)
    scenes = [any_scene(chance) for _ in range(60)]
    pictures = clip.images([render(scene, seed) for seed, scene in enumerate(scenes)])
    right = clip.texts([scene.caption for scene in scenes])
    wrong = clip.texts([with_a_wrong_word(scene, chance).caption for scene in scenes])
    assert ((pictures * right).sum(-1) > (pictures * wrong).sum(-1)).float().mean() > 0.9
