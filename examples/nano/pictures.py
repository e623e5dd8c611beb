"""Training pictures of the VAE: scenes of nano's world, also of subjects and in styles, and unrelated pictures."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from examples.nano.scenes import styled_scene, subject_scene, textured_scene
from sd3tune.nano.world import random_scene, render

SIDE = 64
Pixels = NDArray[np.uint8]
"""[N, 64, 64, 3]"""

_SCENES = {random_scene: 25, textured_scene: 25, subject_scene: 20, styled_scene: 15}
_OTHERS = 0.15  # share of the pictures that show no scene; the others have the weights above


def training_pictures(count: int, seed: int) -> Pixels:
    """Return scenes, many with textures, subjects or styles; one picture in seven is a crop, a gradient or blobs."""
    chance = random.Random(f"vae/{seed}")
    pixels = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for n in tqdm(range(count), desc="pictures", unit=" pictures", mininterval=1):
        if chance.random() < _OTHERS:
            pixels[n] = random_picture(chance)
        else:
            draw_scene = chance.choices(list(_SCENES), list(_SCENES.values()))[0]
            pixels[n] = np.asarray(render(draw_scene(chance), n))
    return pixels


def pictures_in(parquet: Path, count: int) -> Pixels:
    """Return the first `count` images of a parquet file's `image` column, scaled to 64 x 64."""
    column = pq.read_table(parquet, columns=["image"]).column("image").slice(0, count)
    pixels = np.empty((len(column), SIDE, SIDE, 3), np.uint8)
    for n, image in enumerate(tqdm(column, desc="pictures", unit=" pictures", mininterval=1)):
        picture = Image.open(io.BytesIO(image.as_py()["bytes"])).convert("RGB")
        pixels[n] = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return pixels


def random_picture(chance: random.Random) -> Pixels:
    """Return a picture [64, 64, 3] with intermediate colours, soft edges and slanted lines, which the world lacks."""
    return chance.choice((_crop, _gradient, _blobs))(chance)


def _crop(chance: random.Random) -> Pixels:
    """Return a rotated part of a scene with swapped channels."""
    side = chance.randint(SIDE, 3 * SIDE)
    picture = render(random_scene(chance), chance.getrandbits(32), side)
    picture = picture.rotate(chance.uniform(0, 360), Image.Resampling.BICUBIC, fillcolor=_colour(chance))
    left, top = (chance.randint(0, side - SIDE) for _ in range(2))
    picture = picture.crop((left, top, left + SIDE, top + SIDE))
    return np.asarray(picture)[..., chance.sample(range(3), 3)]


def _gradient(chance: random.Random) -> Pixels:
    """Return a gradient between colours in the corners."""
    return _enlarged(chance, 2)


def _blobs(chance: random.Random) -> Pixels:
    """Return soft spots, some with sharpened edges."""
    spots = _enlarged(chance, chance.randint(3, 12)).astype(np.float32) / 255 - 0.5
    return (255 * np.clip(0.5 + spots * chance.choice((1, 1, 3, 9)), 0, 1)).astype(np.uint8)


def _enlarged(chance: random.Random, cells: int) -> Pixels:
    small = np.frombuffer(chance.randbytes(cells * cells * 3), np.uint8).reshape(cells, cells, 3)
    return np.asarray(Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def _colour(chance: random.Random) -> tuple[int, int, int]:
    red, green, blue = chance.randbytes(3)
    return red, green, blue
