"""Measure a nano: the share of captions that it draws right, by kind, with 95 % intervals.

python -m examples.nano.measure_nano data/nano/nano --pictures 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

from sd3tune.commands.demo import SAMPLER, T5_LENGTH
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.nano.tasks import Task, plain_tasks, rich_tasks

_SEED = 20_000  # no seed of the training pictures, demo or benchmarks
_BATCH = 50


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    z = 1.96
    share, size = right / count, 1 + z * z / count
    middle = share + z * z / (2 * count)
    half = z * (share * (1 - share) / count + (z / (2 * count)) ** 2) ** 0.5
    return (middle - half) / size, (middle + half) / size


def kind(task: Task) -> str:
    scene = task.scene
    if scene.other:
        return "two things"
    place_or_size = "place or size" if scene.place or scene.thing.size else "plain"
    return scene.thing.texture or place_or_size


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.measure_nano", description=__doc__)
    parser.add_argument("base", help="a folder in diffusers' layout, or nano")
    parser.add_argument("--pictures", type=int, default=100, help="of each row")
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args(arguments)
    sampler = replace(SAMPLER, guidance=options.guidance)
    pipeline = ImagePipeline(options.base, sampler, t5_length=T5_LENGTH)
    for name, make in (("plain", plain_tasks), ("rich", rich_tasks)):
        for held_out in (False, True):
            tasks = make(options.pictures, held_out, _SEED)
            images = []
            for start in range(0, len(tasks), _BATCH):
                images += pipeline.draw([(task.prompt, task.seed) for task in tasks[start : start + _BATCH]])
            right = [task.is_shown_by(image) for task, image in zip(tasks, images, strict=True)]
            low, high = wilson(sum(right), len(right))
            print(
                f"{name + ', held out' * held_out:16} {sum(right) / len(right):6.1%} ({low:.1%} to {high:.1%})  ",
                _by_kind(tasks, right),
                flush=True,
            )


def _by_kind(tasks: Sequence[Task], right: Sequence[bool]) -> str:
    kinds = [kind(task) for task in tasks]
    shares = []
    for name in sorted(set(kinds)):
        of_kind = [one for one, its in zip(right, kinds, strict=True) if its == name]
        shares.append(f"{name} {sum(of_kind)}/{len(of_kind)}")
    return ", ".join(shares)


if __name__ == "__main__":
    main()
