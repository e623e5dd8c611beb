"""The experiments beside LoRA on the transformer: other methods, and other kinds of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.quality.drawing import Draw
from benchmarks.quality.measure import Panel, Shares, measure_panel, train_quietly
from benchmarks.quality.pictures import (
    SECOND_SUBJECT,
    named,
    per_encoder,
    two_subjects,
    with_captions,
    with_stickers,
)  # fmt: skip
from benchmarks.quality.variants import RECIPE, Variant, own_prediction
from sd3tune.commands.demo import CONFIG
from sd3tune.inference.pipeline import ImagePipeline, PromptAndSeed
from sd3tune.nano.oracle import read
from sd3tune.nano.tasks import (
    CLASS_PROMPTS,
    NAME,
    OTHER_NAME,
    composition_tasks,
    share_right,
    subject_caption,
    subject_tasks,
)  # fmt: skip
from sd3tune.nano.world import CLASS, SUBJECT, Scene

TOKEN = "<heart>"


def _method(name: str, lr: float | None = None, **keys: Any) -> Variant:
    """Return a training of the demo's recipe by another method, at its own learning rate."""
    method = {**CONFIG["method"], **keys} if keys.get("kind") in (None, "dora", "loha", "lokr", "pivotal") else keys
    learned = {} if lr is None else {"optimizer.lr": lr}
    return Variant("method", name, {"method": method, **learned})


def _with_token(variant: Variant) -> Variant:
    return replace(variant, sources=named(TOKEN), word=TOKEN)


def _encoders(lr: float) -> dict[str, Any]:
    return {name: {"lr": lr} for name in ("clip_l", "clip_g")}


_TOKEN_KEYS: Mapping[str, Any] = {"token": TOKEN, "init": CLASS}
METHODS = (
    _method("lora, 0.001"),
    _method("lora+, ratio 4", loraplus_lr_ratio=4.0),
    _method("lora, ranks by gradient", rank="auto", budget_mb=1.35),
    *(_method(f"dora, {lr:g}", lr, kind="dora") for lr in (1e-3, 3e-3)),
    *(_method(f"loha, {lr:g}", lr, kind="loha") for lr in (1e-3, 3e-3)),
    *(_method(f"lokr, {lr:g}", lr, kind="lokr") for lr in (1e-3, 3e-3)),
    *(_method(f"full, {lr:g}", lr, kind="full") for lr in (3e-5, 1e-4, 3e-4)),
    *(_method(f"lora and text encoders, {lr:g}", text_encoders=_encoders(lr)) for lr in (1e-5, 1e-4, 1e-3)),
    *(
        _with_token(_method(f"textual inversion, {lr:g}", lr, kind="textual_inversion", **_TOKEN_KEYS))
        for lr in (5e-3, 2e-2)
    ),
    *(
        _with_token(_method(f"pivotal, {lr:g}", kind="pivotal", embedding={**_TOKEN_KEYS, "lr": lr}))
        for lr in (5e-4, 5e-3)
    ),
)
"""The name says the learning rate; text encoders and tokens have one beside LoRA's, 0.001."""


def _of_colour(scene: Scene) -> str:
    return subject_caption(replace(scene, background=""))


def _of_name(scene: Scene) -> str:
    return f"a {NAME} {CLASS}"


_CAPTIONS = "captions"
_THREE = (subject_caption, _of_colour, _of_name)
_MASKS = "pictures with a sticker"
DATA = (
    RECIPE,
    Variant(_CAPTIONS, "the name alone", sources=with_captions("captions-1", [_of_name])),
    Variant(
        _CAPTIONS,
        "three, one drawn a step",
        sources=with_captions("captions-3", _THREE),
    ),
    Variant(_CAPTIONS, "the name for CLIP, whole for T5", sources=per_encoder),
    Variant(_MASKS, "masks: off", sources=with_stickers(masks="off")),
    Variant(_MASKS, "outside_weight 0.1", sources=with_stickers()),
    Variant(_MASKS, "outside_weight 0", sources=with_stickers(outside_weight=0.0)),
    Variant(_MASKS, "outside_target: base", sources=with_stickers(outside_target="base", outside_weight=1.0)),
)


def measure_data(pipeline: ImagePipeline, panel: Panel, variant: Variant, run: Path, store: Path, seed: int) -> Shares:
    """Train and measure. Also returns `second`, the share of the subject's pictures with more than one thing."""
    train_quietly(variant, run, store, seed)
    drawn: list[Image.Image] = []

    def draw(asked: Sequence[PromptAndSeed]) -> list[Image.Image]:
        drawn.extend(pipeline.draw(asked, adapter=run))
        return drawn

    shares = measure_panel(draw, panel)
    second = sum(read(picture).count > 1 for picture in drawn[: len(panel.subject)]) / len(panel.subject)
    return shares | {"second": second}


_EQUAL = {"data.balance": "equal"}
SUBJECTS = (
    Variant("two subjects", "no prior", _EQUAL, sources=two_subjects()),
    Variant(
        "two subjects",
        "own prediction, captions_without",
        _EQUAL,
        sources=two_subjects(lambda word: own_prediction(CLASS_PROMPTS[0], captions_without=word)),
    ),
    Variant("two subjects", "no prior, 500 steps", {**_EQUAL, "train.steps": 500}, sources=two_subjects()),
)


def measure_subjects(
    pipeline: ImagePipeline, count: int, variant: Variant, run: Path, store: Path, seed: int
) -> Shares:
    """Train two subjects at once and measure them.

    Returns shares of pictures: `first`, `second` and `both` drawn right; `bled`, those of one that show the other.
    """
    train_quietly(variant, run, store, seed)
    draw: Draw = partial(pipeline.draw, adapter=run)
    of_first = subject_tasks(count // 2, seed)
    of_second = [
        replace(task, prompt=task.prompt.replace(NAME, OTHER_NAME))
        for task in subject_tasks(count // 2, seed, SECOND_SUBJECT)
    ]
    together = composition_tasks(count // 2, seed, (SUBJECT, SECOND_SUBJECT))
    first, second, both = (
        draw([(task.prompt, task.seed) for task in tasks]) for tasks in (of_first, of_second, together)
    )
    bled = [*_shows(first, SECOND_SUBJECT), *_shows(second, SUBJECT)]
    return {
        "first": share_right(of_first, first),
        "second": share_right(of_second, second),
        "both": share_right(together, both),
        "bled": sum(bled) / len(bled),
    }


def _shows(pictures: Sequence[Image.Image], subject: str) -> list[bool]:
    return [any(thing.shape == subject for thing in read(picture, True).things) for picture in pictures]
