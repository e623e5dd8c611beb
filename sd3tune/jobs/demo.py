"""`sd3tune demo`: the main job on packaged pictures: train, then draw before and after, in one picture."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from PIL import Image

import sd3tune
from sd3tune.config import load_config, parse_config
from sd3tune.errors import RunError, UserError
from sd3tune.jobs.conditions import Request
from sd3tune.jobs.infer import run_infer
from sd3tune.jobs.run_folder import LOCK_FILE, locked
from sd3tune.jobs.train import run_training
from sd3tune.sampling.contact_sheet import contact_sheet

PICTURES = Path(sd3tune.__file__).parent / "assets" / "demo"
PROMPT = "a photo of sks robot on a beach"
SIDE = 128

CONFIG = {
    "name": "demo",
    "model": {"base": "tiny", "max_sequence_length": 77},
    "method": {"rank": 16, "alpha": 16.0},
    "data": {"sources": [{"path": str(PICTURES)}], "resolution": SIDE},
    "flow": {"shift": 1.0},
    "optimizer": {"lr": 5e-3},
    "train": {"steps": 60, "batch_size": 2},
    "checkpoint": {"every": 30},
}


def run_demo(out: Path) -> Path:
    """Train into `out` and write `out/demo.png`. An earlier demo there is replaced; anything else is left alone."""
    started = time.monotonic()
    config = parse_config({**CONFIG, "output_dir": str(out.absolute())}).config
    print("Training a LoRA on six pictures of a toy robot, then drawing one prompt with and without it.")
    print("The base is `tiny`: a Stable Diffusion 3.5 in miniature whose weights are random. So its pictures are")
    print("patterns, and what counts is that the adapter changes them and lowers the loss.\n")
    _remove_earlier_demo(out)
    run_training(config)
    written = run_infer(
        Request(loras=[str(out)], prompt=PROMPT, out=out / "images", steps=12, guidance=4.0, num=len(_pictures()))
    )
    picture = out / "demo.png"
    _stack(_training_row(), Image.open(written[-1])).save(picture)
    print(f"\n{picture}  (the training pictures, then before and after)   {time.monotonic() - started:.0f} s in all")
    print("\nyour own photos: a folder of them and a GPU:")
    print("  sd3tune config new my-dog --data ./dog --caption 'a photo of sks dog'")
    print("  sd3tune train my-dog.yaml")
    return picture


def _pictures() -> list[Path]:
    return sorted(PICTURES.glob("*.png"))


def _remove_earlier_demo(out: Path) -> None:
    inside = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if inside <= {LOCK_FILE}:
        return
    if not _is_demo(out / "config.yaml"):
        raise RunError(f"--out: {out} exists and is not an earlier demo; choose another folder")
    with locked(out):
        shutil.rmtree(out)


def _is_demo(config: Path) -> bool:
    """Whether a run is of this name and on the packaged pictures: a user's own may well be called demo."""
    try:
        found = load_config(config).config
    except UserError:
        return False
    return found.name == CONFIG["name"] and Path(found.data.sources[0].path).parts[-2:] == PICTURES.parts[-2:]


def _training_row() -> Image.Image:
    return contact_sheet([[Image.open(path) for path in _pictures()]], rows=["trained on"], side=SIDE)


def _stack(*pictures: Image.Image) -> Image.Image:
    stacked = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    top = 0
    for picture in pictures:
        stacked.paste(picture, (0, top))
        top += picture.height
    return stacked
