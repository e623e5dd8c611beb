"""Accuracy of a base and of adapters, judged by the oracle. Shares are of pictures, 0 to 1."""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from benchmarks.quality.drawing import Draw, drawn_by
from benchmarks.quality.variants import OTHER_SHAPES, PRIOR_SHAPES, Variant
from sd3tune.commands.train import run_training
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.methods import products
from sd3tune.nano.oracle import read
from sd3tune.nano.tasks import NAME, Task, class_tasks, plain_tasks, rich_tasks, share_right, subject_tasks
from sd3tune.nano.world import SUBJECT
from sd3tune.training.loop import Callback

Shares = dict[str, float]


@dataclass(frozen=True)
class Panel:
    """The prompts and seeds for every adapter."""

    subject: Sequence[Task]
    named: Sequence[Task]
    """Shapes that priors of several prompts name, in combinations that no prior names."""
    others: Sequence[Task]
    """Shapes that no prior names."""
    of_class: Sequence[Task]

    @classmethod
    def of(cls, count: int, seed: int) -> Panel:
        """Return a panel of `count` prompts for the subject, half as many for each kind of shape, a third of the class.

        No prior of the variants has one of these prompts.
        """
        named, others = (plain_tasks(count // 2, False, seed, shapes) for shapes in (PRIOR_SHAPES, OTHER_SHAPES))
        return cls(subject_tasks(count, seed), named, others, class_tasks(count // 3, seed))

    @property
    def tasks(self) -> list[Task]:
        return [*self.subject, *self.named, *self.others, *self.of_class]


def measure_panel(draw: Draw, panel: Panel, name: str = NAME) -> Shares:
    """Return shares: `subject`, `named` and `others` drawn right; `class_lost`, subjects drawn for the class.

    `name` stands for the subject in the prompts.
    """
    images = iter(draw([(task.prompt.replace(NAME, name), task.seed) for task in panel.tasks]))
    subject, named, others, of_class = (
        [next(images) for _ in of] for of in (panel.subject, panel.named, panel.others, panel.of_class)
    )
    return {
        "subject": share_right(panel.subject, subject),
        "named": share_right(panel.named, named),
        "others": share_right(panel.others, others),
        "class_lost": sum(_shows_subject(image) for image in of_class) / len(of_class),
    }


def measure_base(pipeline: ImagePipeline, count: int, seed: int) -> Shares:
    """Return the share of prompts that the base draws right, by kind of prompt."""
    kinds = {
        "plain, seen": plain_tasks(count, False, seed),
        "plain, held out": plain_tasks(count, True, seed),
        "rich, seen": rich_tasks(count, False, seed),
        "rich, held out": rich_tasks(count, True, seed),
    }
    shares: Shares = {}
    for kind, tasks in kinds.items():
        images = pipeline.draw([(task.prompt, task.seed) for task in tasks], activity=kind)
        shares[kind] = share_right(tasks, images)
        if kind == "rich, seen":
            shares |= _by_question(tasks, images)
    return shares


def measure_lora(pipeline: ImagePipeline, panel: Panel, variant: Variant, run: Path, store: Path, seed: int) -> Shares:
    """Train and measure. `train_s` is the duration of the whole command, with cached encodings, in seconds."""
    seconds = train_quietly(variant, run, store, seed)
    return measure_panel(partial(pipeline.draw, adapter=run), panel) | {"train_s": seconds}


def measure_method(panel: Panel, variant: Variant, run: Path, store: Path, seed: int) -> Shares:
    """Train by any method and measure it.

    Also returns `size_kb`, of its weights in fp32 or as the method writes them, and `cpu_s`, the CPU seconds of 100
    steps, which hardly depend on the machine's other load.
    """
    seconds: list[float] = []
    train_quietly(variant, run, store, seed, [lambda view: seconds.append(time.process_time())])
    product = next(product for product in products() if product.is_in(run))
    size = sum(file.stat().st_size for file in (run / product.name).rglob("*.safetensors"))
    steps = len(seconds) - 1
    costs = {"size_kb": size / 1000, "cpu_s": 100 * (seconds[-1] - seconds[0]) / steps}
    return measure_panel(drawn_by(run), panel, variant.word) | costs


def train_quietly(variant: Variant, run: Path, store: Path, seed: int, callbacks: Sequence[Callback] = ()) -> float:
    """Train into `run` without output. Return the seconds of the whole command."""
    config = variant.config(str(run), str(store), seed)
    started = time.monotonic()
    with quietly():
        run_training(config, callbacks=[*variant.callbacks, *callbacks])
    return time.monotonic() - started


def _by_question(tasks: Sequence[Task], images: Sequence[Image.Image]) -> Shares:
    """Return the share drawn right of each attribute in rich captions that have it."""
    verdicts = [task.judge(image) for task, image in zip(tasks, images, strict=True)]
    shares: Shares = {}
    for question in ("background", "colour", "shape", "size", "texture", "place", "relation", "other"):
        answers = [answer for verdict in verdicts if (answer := getattr(verdict, question)) is not None]
        if answers:
            shares[f"rich: {question}"] = sum(answers) / len(answers)
    return shares


def _shows_subject(image: Image.Image) -> bool:
    return any(thing.shape == SUBJECT for thing in read(image).things)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Discard the output of the body."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
