"""Write the training data of nano's transformer: captioned scenes, and held-out ones.

python -m examples.nano.render --out data/nano
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from examples.nano.scenes import textured_scene
from sd3tune.data.sources.dataset import write_parquet
from sd3tune.files.atomic import new_file
from sd3tune.nano.world import Scene, plain_scenes, random_scene, render

LEADS = ("a photo of ", "a picture of ")
_LED = 0.12  # share of captions of one thing that begin with one of them; T5 would cut others off
_TEXTURED = 0.35  # share of scenes whose things all have a texture, the hardest to draw


def training_rows(count: int, seed: int) -> Iterator[tuple[str, bytes, str]]:
    """Yield (file name, PNG, caption) of random scenes, some with incomplete captions."""
    chance = random.Random(f"training/{seed}")
    for n in range(count):
        scene = textured_scene(chance) if chance.random() < _TEXTURED else random_scene(chance)
        lead = chance.choice(LEADS) if chance.random() < _LED and not scene.other else ""
        yield f"{n:06d}.png", png(render(scene, n)), lead + scene.caption


def held_out_rows(count: int, seed: int) -> Iterator[tuple[str, bytes, str]]:
    """Yield (file name, PNG, caption) of all held-out plain scenes, then of richer scenes with a held-out thing."""
    for n, scene in enumerate(held_out_scenes(count, seed)):
        yield f"{n:06d}.png", png(render(scene, n)), scene.caption


def held_out_scenes(count: int, seed: int) -> list[Scene]:
    chance = random.Random(f"held out/{seed}")
    plain = plain_scenes(held_out=True)[:count]
    return plain + [random_scene(chance, held_out=True) for _ in range(count - len(plain))]


def png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def write(path: Path, rows: Iterable[tuple[str, bytes, str]], count: int) -> None:
    with new_file(path) as temporary:
        write_parquet(temporary, tqdm(rows, desc=path.name, total=count, unit=" pictures", mininterval=1))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.render", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for pictures.parquet and held_out.parquet")
    parser.add_argument("--pictures", type=int, default=40_000)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    write(options.out / "pictures.parquet", training_rows(options.pictures, options.seed), options.pictures)
    write(options.out / "held_out.parquet", held_out_rows(options.held_out, options.seed), options.held_out)


if __name__ == "__main__":
    main()
