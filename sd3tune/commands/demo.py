"""`sd3tune demo`: DreamBooth on nano, with and without prior preservation, in one picture and three measured lines."""

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
from sd3tune.errors import RunError, UserError
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.invocation import command_line
from sd3tune.nano.tasks import CLASS_PROMPTS, Task, class_tasks, plain_tasks, share_right, subject_tasks
from sd3tune.reporting import result, say
from sd3tune.run.folder import LOCK_FILE, locked
from sd3tune.sampling.contact_sheet import contact_sheet
from sd3tune.sampling.sampler import SamplerSettings

PICTURES = Path(sd3tune.__file__).parent / "assets" / "heart"
SIDE, SHOWN_SIDE = 64, 128
T5_LENGTH = 16
SAMPLER = SamplerSettings(steps=10, guidance=4.0, height=SIDE, width=SIDE)

CONFIG: dict[str, Any] = {
    "name": "demo",
    "model": {"base": "nano", "max_sequence_length": T5_LENGTH},
    "method": {"rank": 16, "alpha": 16.0},
    "data": {"sources": [{"path": str(PICTURES)}], "resolution": SIDE},
    "optimizer": {"lr": 1e-3},
    "train": {"steps": 250, "batch_size": 6},
    "checkpoint": {"every": 125},
    "preview": {"steps": SAMPLER.steps, "guidance": SAMPLER.guidance},  # none is drawn; `infer` follows them
}
PRIOR = {"prompt": list(CLASS_PROMPTS), "images": 52, "steps": 10, "guidance": 4.0}
MADE = ("alone", "with_prior", "demo.png")
"""What the demo writes into its folder: two runs and a picture."""
COUNT = 16
"""Pictures of a kind that the oracle reads."""


def run_demo(out: Path) -> Path:
    """Train twice into `out` and write `out/demo.png`. An earlier demo is replaced, and nothing else removed."""
    started = time.monotonic()
    say("Six pictures of a shape that the base `nano` has never seen, a heart, teach it a new word, 'sks'.")
    say("nano is a real Stable Diffusion 3.5 in small, trained on shapes that sd3tune draws; a reader that knows")
    say("what was asked for looks at every picture. Two trainings, without and with prior preservation.", "")
    _remove_earlier_demo(out)
    with locked(out):
        picture, figures = _train_and_show(out)
    say("")
    result(f"{picture}   {time.monotonic() - started:.0f} s in all", picture=picture)
    say("", *figures, "")
    say("draw with it, or train on a folder of your own photos (with a GPU):")
    lora, prompt = out / "with_prior", "an orange sks shape on a black background"
    for words in (
        ["infer", "--lora", str(lora), "--prompt", prompt, "--size", f"{SIDE}x{SIDE}"],
        ["config", "new", "my-dog", "--data", "./dog", "--caption", "a photo of sks dog"],
        ["train", "my-dog.yaml"],
    ):
        say(f"  {command_line('sd3tune', *words)}")
    return picture


def _train_and_show(out: Path) -> tuple[Path, list[str]]:
    """The picture's file, and what was read in the drawn pictures."""
    runs = {"alone": out / "alone", "kept": out / "with_prior"}
    say("1 of 3: the pictures alone")
    run_training(demo_config(runs["alone"], None))
    say("", "2 of 3: beside pictures of the class, 'a shape', 'a star' and so on, that the base draws first")
    run_training(demo_config(runs["kept"], PRIOR))
    say("", "3 of 3: drawing with and without the adapters")
    picture, figures = _show(runs)
    picture.save(out / "demo.png")
    return out / "demo.png", figures


def demo_config(run: Path, prior: dict[str, Any] | None) -> Config:
    """One of the demo's two trainings."""
    data = {**CONFIG["data"], "sources": [{**source, "prior": prior} for source in CONFIG["data"]["sources"]]}
    return parse_config({**CONFIG, "data": data, "output_dir": str(run.absolute())}).config


def _show(runs: dict[str, Path]) -> tuple[Image.Image, list[str]]:
    """The picture, and the lines of what was read in the drawn ones."""
    pipeline = ImagePipeline("nano", SAMPLER, t5_length=T5_LENGTH)
    asked = {
        "the subject": subject_tasks(COUNT, seed=1),
        "the class": class_tasks(COUNT, seed=2),
        "other shapes": plain_tasks(COUNT, held_out=False, seed=3),
    }
    wishes = [(task.prompt, task.seed) for tasks in asked.values() for task in tasks]
    drawn: dict[str, dict[str, list[Image.Image]]] = {}
    for name, adapter in (("before", None), *runs.items()):
        images = iter(pipeline.draw(wishes, adapter, activity=f"drawing {name}"))
        drawn[name] = {kind: [next(images) for _ in tasks] for kind, tasks in asked.items()}
    return _picture(asked, drawn), _figures(asked, drawn)


def _figures(asked: dict[str, list[Task]], drawn: dict[str, dict[str, list[Image.Image]]]) -> list[str]:
    titles = {"before": "before", "alone": "after", "kept": "with prior preservation"}
    widths = [max(10, len(title) + 2) for title in titles.values()]
    heads = "".join(f"{title:>{width}}" for title, width in zip(titles.values(), widths, strict=True))
    lines = [f"{f'right, of {COUNT} pictures':64}{heads}"]
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
        for path in (out / name for name in MADE):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _is_demo(config: Path) -> bool:
    """Whether a run is of this name and on the packaged pictures: a user's own may well be called demo."""
    try:
        found = load_config(config).config
    except UserError:
        return False
    return found.name == CONFIG["name"] and Path(found.data.sources[0].path).parts[-2:] == PICTURES.parts[-2:]
