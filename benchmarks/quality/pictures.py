"""Pictures to train on, of several kinds: under another name, with stickers and masks, of two subjects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from sd3tune.nano.tasks import INSTANCES, NAME, OTHER_NAME, instances, subject_caption
from sd3tune.nano.world import CLASS, COLOURS, SUBJECT, Scene, render

SECOND_SUBJECT = "crown"
_STICKERS = ("orange", "white", "red", "black", "orange", "yellow")
"""Colour of the sticker on each picture: neither the subject's nor the background's."""


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


def with_stickers(**keys: Any) -> Callable[[Path], list[dict[str, Any]]]:
    """Return a source of the demo's pictures with a sticker in a corner, which captions do not mention.

    Each has a mask, all but the corner, which `keys` of the source can switch off or weigh.
    """

    def draw(folder: Path) -> list[dict[str, Any]]:
        path = Path(_written(folder / "stickers", INSTANCES, [[subject_caption(scene)] for scene in INSTANCES]))
        for number, colour in enumerate(_STICKERS):
            picture = Image.open(path / f"{number}.png").convert("RGB")
            ImageDraw.Draw(picture).ellipse(_box(picture.width, 2), fill=COLOURS[colour])
            picture.save(path / f"{number}.png")
            mask = Image.new("L", picture.size, 255)
            ImageDraw.Draw(mask).rectangle(_box(picture.width, 0), fill=0)
            mask.save(path / f"{number}_mask.png")
        return [{"path": str(path), **keys}]

    return draw


def _box(side: int, margin: int) -> tuple[int, int, int, int]:
    """Return the right lower corner of a picture, a quarter of its side."""
    return side * 3 // 4 + margin, side * 3 // 4 + margin, side - 1 - margin, side - 1 - margin


def two_subjects(prior: Callable[[str], dict[str, Any]] | None = None) -> Callable[[Path], list[dict[str, Any]]]:
    """Return two sources, of the heart as `sks shape` and of the crown as `tok shape`; `prior` is given the name."""

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
