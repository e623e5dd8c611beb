"""Pictures to train on, of several kinds: under another name, beside other things with masks, of two subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sd3tune.nano.tasks import INSTANCES, NAME, OTHER_NAME, instances, subject_caption
from sd3tune.nano.world import CLASS, RELATIONS, SHAPES, SUBJECT, Scene, Thing, render

SECOND_SUBJECT = "moon"
_DISTRACTORS = ("orange", "black", "white", "red", "blue", "yellow")
"""Colours of the things beside the subject, for each of its pictures: in none the subject's or the background's."""


def named(word: str) -> Callable[[Path], list[dict[str, Any]]]:
    """Return a source of the demo's pictures whose captions call the subject `word`."""

    def draw(folder: Path) -> list[dict[str, Any]]:
        captions = [[subject_caption(scene).replace(NAME, word)] for scene in INSTANCES]
        return [{"path": _written(folder / f"named-{word.strip('<>')}", INSTANCES, captions)}]

    return draw


def with_captions(name: str, captions: Sequence[Callable[[Scene], str]]) -> Callable[[Path], list[dict[str, Any]]]:
    """Return a source of the demo's pictures with several captions each, one a line of the text file."""

    def draw(folder: Path) -> list[dict[str, Any]]:
        texts = [[caption(scene) for caption in captions] for scene in INSTANCES]
        return [{"path": _written(folder / name, INSTANCES, texts), "captions": "lines"}]

    return draw


def per_encoder(folder: Path) -> list[dict[str, Any]]:
    """Return a source whose CLIP captions are only the subject's name, and whose T5 captions describe the picture."""
    path = _written(folder / "per-encoder", INSTANCES, [[subject_caption(scene)] for scene in INSTANCES])
    for picture in Path(path).glob("*.png"):
        picture.with_suffix(".clip.txt").write_text(f"a {NAME} {CLASS}\n", encoding="utf-8")
    return [{"path": path}]


def beside_others(**keys: Any) -> Callable[[Path], list[dict[str, Any]]]:
    """Return a source of pictures in which another thing stands beside the subject; captions do not mention it.

    Each has a mask, the half with the subject, which `keys` of the source can switch off or weigh.
    """

    def draw(folder: Path) -> list[dict[str, Any]]:
        scenes = [
            replace(scene, relation=RELATIONS[number % len(RELATIONS)], other=Thing(colour, SHAPES[number]))
            for number, (scene, colour) in enumerate(zip(INSTANCES, _DISTRACTORS, strict=True))
        ]
        captions = [[subject_caption(scene)] for scene in INSTANCES]
        path = _written(folder / "beside-others", scenes, captions)
        for number, scene in enumerate(scenes):
            _rectangle(scene.relation).save(Path(path) / f"{number}_mask.png")
        return [{"path": path, **keys}]

    return draw


def two_subjects(prior: Callable[[str], dict[str, Any]] | None = None) -> Callable[[Path], list[dict[str, Any]]]:
    """Return two sources, of the heart as `sks shape` and of the moon as `zwx shape`; `prior` is given the name."""

    def draw(folder: Path) -> list[dict[str, Any]]:
        sources = []
        for subject, word in ((SUBJECT, NAME), (SECOND_SUBJECT, OTHER_NAME)):
            scenes = instances(subject)
            captions = [[subject_caption(scene).replace(NAME, word)] for scene in scenes]
            own = {} if prior is None else {"prior": prior(word)}
            sources.append({"path": _written(folder / subject, scenes, captions), "name": subject, **own})
        return sources

    return draw


def _written(folder: Path, scenes: Sequence[Scene], captions: Sequence[Sequence[str]]) -> str:
    """Write pictures with their captions, one a line, unless they exist. Return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (scene, lines) in enumerate(zip(scenes, captions, strict=True)):
        render(scene, number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def _rectangle(relation: str, side: int = 64) -> Image.Image:
    """Return a mask of the half of the picture that holds the first of two things."""
    half, mask = side // 2, Image.new("L", (side, side), 0)
    box = {
        "left of": (0, 0, half - 1, side - 1),
        "right of": (half, 0, side - 1, side - 1),
        "above": (0, 0, side - 1, half - 1),
        "below": (0, half, side - 1, side - 1),
    }[relation]
    ImageDraw.Draw(mask).rectangle(box, fill=255)
    return mask
