"""`sd3tune demo`: run DreamBooth on nano with and without prior preservation; write one picture and three scores."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

import sd3tune
from sd3tune.commands.train import run_training
from sd3tune.config import Config, load_config, parse_config
from sd3tune.config.run_folder import LOCK_FILE
from sd3tune.errors import RunError, UserError
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.invocation import command_line
from sd3tune.nano.tasks import CLASS_PROMPTS, Task, class_tasks, plain_tasks, share_right, subject_tasks
from sd3tune.reporting import result, say
from sd3tune.run.folder import locked
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sampler import SamplerSettings

PICTURES = Path(sd3tune.__file__).parent / "assets" / "heart"
SIDE, SHOWN_SIDE = 64, 128
T5_LENGTH = 16
SAMPLER = SamplerSettings(steps=10, guidance=2.0, height=SIDE, width=SIDE)

CONFIG: dict[str, Any] = {
    "name": "demo",
    "model": {"base": "nano", "max_sequence_length": T5_LENGTH},
    "method": {"rank": 16, "alpha": 16.0},
    "data": {"sources": [{"path": str(PICTURES)}], "resolution": SIDE},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 250, "batch_size": 6},
    "checkpoint": {"every": 125},
    "preview": {"steps": SAMPLER.steps, "guidance": SAMPLER.guidance},  # no previews; `infer` uses these
}
PRIOR = {"prompt": list(CLASS_PROMPTS), "images": 52, "steps": 10, "guidance": SAMPLER.guidance}
OUTPUTS = ("alone", "with_prior", "demo.png")
"""Outputs in the demo's folder: two runs and a picture."""
COUNT = 16
"""Number of pictures per kind of prompt that the oracle scores."""


def run_demo(out: Path) -> Path:
    """Train twice into `out`, write `out/demo.png` and return its path. Replaces an earlier demo, but no other file."""
    started = time.monotonic()
    say("Fine-tune `nano` on six pictures of a heart, a shape it has never seen, with the new word 'sks'.")
    say("nano is a small but real Stable Diffusion 3.5, trained on shapes drawn by sd3tune. A classifier that knows")
    say("the prompt checks every picture. Two runs: without and with prior preservation.", "")
    _remove_earlier_demo(out)
    with locked(out):
        picture, figures = _train_and_show(out)
    say("")
    result(f"{picture}   {time.monotonic() - started:.0f} s in all", picture=picture)
    say("", *figures, "")
    say("next: draw with it, or train on your own photos (needs a GPU):")
    lora, prompt = out / "with_prior", "an orange sks shape on a black background"
    for words in (
        ["infer", "--lora", str(lora), "--prompt", prompt, "--size", f"{SIDE}x{SIDE}"],
        ["config", "new", "my-dog", "--data", "./dog", "--caption", "a photo of sks dog"],
        ["train", "my-dog.yaml"],
    ):
        say(f"  {command_line('sd3tune', *words)}")
    return picture


def _train_and_show(out: Path) -> tuple[Path, list[str]]:
    """Return the picture's path, and lines with the scores."""
    runs = {"alone": out / "alone", "kept": out / "with_prior"}
    say("1 of 3: train on the pictures alone")
    run_training(demo_config(runs["alone"], None))
    say("", "2 of 3: train with class pictures, such as 'a shape' and 'a star', drawn by the base first")
    run_training(demo_config(runs["kept"], PRIOR))
    say("", "3 of 3: draw with and without the adapters")
    picture, figures = _show(runs)
    picture.save(out / "demo.png")
    return out / "demo.png", figures


def demo_config(run: Path, prior: dict[str, Any] | None) -> Config:
    """Return the configuration of one of the demo's two runs."""
    data = {**CONFIG["data"], "sources": [{**source, "prior": prior} for source in CONFIG["data"]["sources"]]}
    return parse_config({**CONFIG, "data": data, "output_dir": str(run.absolute())}).config


def _show(runs: dict[str, Path]) -> tuple[Image.Image, list[str]]:
    """Draw with and without the adapters; return the contact sheet, and lines with the scores."""
    pipeline = ImagePipeline("nano", SAMPLER, t5_length=T5_LENGTH)
    asked = {
        "the subject": subject_tasks(COUNT, seed=1),
        "the class": class_tasks(COUNT, seed=2),
        "other shapes": plain_tasks(COUNT, held_out=False, seed=3),
    }
    requests = [(task.prompt, task.seed) for tasks in asked.values() for task in tasks]
    drawn: dict[str, dict[str, list[Image.Image]]] = {}
    for name, adapter in (("before", None), *runs.items()):
        images = iter(pipeline.draw(requests, adapter, activity=f"drawing {name}"))
        drawn[name] = {kind: [next(images) for _ in tasks] for kind, tasks in asked.items()}
    return _picture(asked, drawn), _figures(asked, drawn)


def _figures(asked: dict[str, list[Task]], drawn: dict[str, dict[str, list[Image.Image]]]) -> list[str]:
    titles = {"before": "before", "alone": "after", "kept": "with prior preservation"}
    widths = [max(10, len(title) + 2) for title in titles.values()]
    heads = "".join(f"{title:>{width}}" for title, width in zip(titles.values(), widths, strict=True))
    lines = [f"{f'correct, out of {COUNT} pictures':64}{heads}"]
    for kind, tasks in asked.items():
        shares = [round(COUNT * share_right(tasks, drawn[name][kind])) for name in titles]
        counts = "".join(f"{share:{width}}" for share, width in zip(shares, widths, strict=True))
        lines.append(f"{f'  {kind}, such as {tasks[0].prompt!r}':64}{counts}")
    return lines


def _picture(asked: dict[str, list[Task]], drawn: dict[str, dict[str, list[Image.Image]]]) -> Image.Image:
    instances = [Image.open(path) for path in sorted(PICTURES.glob("*.png"))]
    wide = len(instances)
    rows: dict[str, Sequence[Image.Image]] = {
        "trained on, each with its caption": instances,
        f"before: {asked['the subject'][0].prompt}, and other colours": drawn["before"]["the subject"][:wide],
        "after": drawn["alone"]["the subject"][:wide],
        "other shapes before": drawn["before"]["other shapes"][:wide],
        "other shapes after": drawn["alone"]["other shapes"][:wide],
        "other shapes after, with prior preservation": drawn["kept"]["other shapes"][:wide],
    }
    return contact_sheet(list(rows.values()), rows=list(rows), side=SHOWN_SIDE)


def _remove_earlier_demo(out: Path) -> None:
    inside = {path.name for path in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    if inside <= {LOCK_FILE}:
        return
    if not _is_demo(out / "alone" / "config.yaml"):
        raise RunError(f"--out: {out} exists and is not an earlier demo; choose another folder")
    with locked(out):
        for path in (out / name for name in OUTPUTS):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_demo(config: Path) -> bool:
    """Return True for a run with the demo's name and pictures: the name alone could be a user's own run."""
    try:
        found = load_config(config).config
    except UserError:
        return False
    return found.name == CONFIG["name"] and Path(found.data.sources[0].path).parts[-2:] == PICTURES.parts[-2:]
