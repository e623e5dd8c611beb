"""Measure the oracle's accuracy: on pictures as drawn, noisy, blurred, as JPEG and, with --vae FOLDER, decoded.

python -m examples.nano.measure_oracle --pictures 2000

The first table is for the world that nano is trained on and the heart, the second for all subjects, styles and textured
things, for which the oracle also looks at everything.
"""

from __future__ import annotations

import argparse
import io
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from examples.nano.scenes import styled_scene, subject_scene, textured_scene
from sd3tune.nano.oracle import Reading, judge_reading, read
from sd3tune.nano.world import SHAPES, SUBJECT, Scene, complete, random_scene, render

Change = Callable[[Image.Image], Image.Image]
ChangeAll = Callable[[list[Image.Image]], list[Image.Image]]


def main() -> None:
    arguments = parsed()
    scenes = drawn_scenes(arguments.pictures)
    pictures = [render(scene, seed) for seed, scene in enumerate(scenes)]
    confused: Counter[tuple[str, str]] = Counter()
    print(f"{'pictures':14} {'right':>7} {'plain':>7} {'rich':>7} {'pairs':>7} {'per second':>11}")
    for name, change in changes(arguments.vae).items():
        changed = change(pictures)
        start = time.process_time()
        readings = [read(picture) for picture in changed]
        speed = len(readings) / (time.process_time() - start)
        right = [as_drawn(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]
        print(f"{name:14} {share(right)} {by_kind(right, scenes)} {speed:11.0f}", flush=True)
        if arguments.show:
            print_wrong(readings, scenes, right)
        confused += confusion(readings, scenes)
    print_confusion(confused)
    print_everything(arguments)


def print_everything(arguments: argparse.Namespace) -> None:
    """Print the share that is read as drawn by kind of scene, with all subjects and styles known."""
    draws = {"subjects": subject_scene, "styles": styled_scene, "textured": textured_scene, "mix": random_scene}
    print("\n" + "pictures".ljust(14) + " ".join(f"{name:>8}" for name in draws))
    kinds = {}
    for name, draw in draws.items():
        chance = random.Random(name)
        kinds[name] = [complete(draw(chance), chance) for _ in range(arguments.pictures)]
    pictures = {name: [render(scene, seed) for seed, scene in enumerate(scenes)] for name, scenes in kinds.items()}
    for change_name, change in changes(arguments.vae).items():
        shares = []
        for name, scenes in kinds.items():
            readings = [read(picture, everything=True) for picture in change(pictures[name])]
            shares.append(share([as_drawn(reading, scene) for reading, scene in zip(readings, scenes, strict=True)]))
            if arguments.show:
                print_wrong(readings, scenes, [as_drawn(*pair) for pair in zip(readings, scenes, strict=True)])
        print(f"{change_name:14} {'  '.join(shares)}", flush=True)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--vae", type=Path, help="a VAE in diffusers' layout")
    parser.add_argument("--show", action="store_true", help="print each picture that is misread")
    return parser.parse_args()


def drawn_scenes(count: int) -> list[Scene]:
    """Return scenes of the training mix with all words; one in seven single things is the subject."""
    chance = random.Random(0)
    scenes = [complete(random_scene(chance), chance) for _ in range(count)]
    return [
        scene if scene.other or chance.random() > 1 / 7 else replace(scene, thing=replace(scene.thing, shape=SUBJECT))
        for scene in scenes
    ]


def changes(vae: Path | None) -> dict[str, ChangeAll]:
    ways: dict[str, ChangeAll] = {
        "as drawn": list,
        "noise 10/255": one_by_one(noisy(10)),
        "blur 0.7": one_by_one(blurred(0.7)),
        "blur 1": one_by_one(blurred(1)),
        "JPEG 60": one_by_one(jpeg),
    }
    return {**ways, "VAE": through_vae(vae)} if vae else ways


def one_by_one(change: Change) -> ChangeAll:
    return lambda pictures: [change(picture) for picture in pictures]


def noisy(sigma: float) -> Change:
    chance = np.random.default_rng(0)

    def change(picture: Image.Image) -> Image.Image:
        pixels = np.asarray(picture, np.float32)
        return Image.fromarray(np.clip(pixels + chance.normal(0, sigma, pixels.shape), 0, 255).astype(np.uint8))

    return change


def blurred(radius: float) -> Change:
    return lambda picture: picture.filter(ImageFilter.GaussianBlur(radius))


def jpeg(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=60)
    return Image.open(file).convert("RGB")


def through_vae(folder: Path, batch: int = 50) -> ChangeAll:
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder).eval()

    @torch.no_grad()
    def change(pictures: list[Image.Image]) -> list[Image.Image]:
        pixels = torch.from_numpy(np.stack([np.asarray(picture, np.float32) for picture in pictures]) / 127.5 - 1)
        parts = pixels.permute(0, 3, 1, 2).split(batch)
        decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in parts])
        channels_last = ((decoded.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).byte().numpy()
        return [Image.fromarray(picture) for picture in channels_last]

    return change


def as_drawn(reading: Reading, scene: Scene) -> bool:
    """Return True if a reading equals the scene in all parts, also in those that a caption leaves open."""
    if not judge_reading(reading, scene).right or any(seen.style != scene.style for seen in reading.things):
        return False
    if scene.other:
        return sorted(seen.texture for seen in reading.things) == sorted(thing.texture for thing in scene.things)
    seen = reading.things[0]
    return (seen.size, seen.texture, seen.place) == (scene.thing.size, scene.thing.texture, scene.place)


def by_kind(right: list[bool], scenes: list[Scene]) -> str:
    kinds = [kind(scene) for scene in scenes]
    return " ".join(
        share([one for one, of in zip(right, kinds, strict=True) if of == name]) for name in ("plain", "rich", "pair")
    )


def kind(scene: Scene) -> str:
    if scene.other:
        return "pair"
    return "rich" if scene.place or scene.thing.size or scene.thing.texture else "plain"


def share(right: list[bool]) -> str:
    return f"{sum(right) / max(len(right), 1):7.2%}"


def confusion(readings: list[Reading], scenes: list[Scene]) -> Counter[tuple[str, str]]:
    """Return how often each shape of a single thing was read as each shape."""
    return Counter(
        (scene.thing.shape, (reading.things[0].shape if reading.things else None) or "none")
        for reading, scene in zip(readings, scenes, strict=True)
        if not scene.other
    )


def print_confusion(confused: Counter[tuple[str, str]]) -> None:
    shapes = (*SHAPES, SUBJECT)
    print("\ndrawn, read".ljust(15) + " ".join(f"{shape:>8}" for shape in (*shapes, "none")))
    for drawn in shapes:
        print(drawn.ljust(14) + " ".join(f"{confused[drawn, seen]:8}" for seen in (*shapes, "none")))


def print_wrong(readings: list[Reading], scenes: list[Scene], right: list[bool]) -> None:
    for seed, (reading, scene) in enumerate(zip(readings, scenes, strict=True)):
        if not right[seed]:
            print(f"  seed {seed}, {scene.caption}: {reading}")


if __name__ == "__main__":
    main()
