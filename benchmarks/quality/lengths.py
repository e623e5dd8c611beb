"""`python -m benchmarks.quality.lengths`: does an adapter work at T5 lengths that it was not trained at?

It makes pairs of trainings on nano with prior preservation: at one T5 length, and at that length and a longer one. Each
adapter then draws at several lengths. Figures go to `results/t5_lengths.json` and, between markers, into the README.
Existing figures are kept, so an interrupted command continues.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.intervals import mean_and_half_width
from benchmarks.quality.measure import train_quietly
from benchmarks.quality.variants import WITH_CLASS_IMAGES, Variant
from benchmarks.report import environment, provenance, replace_between
from sd3tune.commands.demo import SAMPLER, T5_LENGTH
from sd3tune.files.atomic import write_json
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.nano.tasks import plain_tasks, share_right, subject_tasks

ONE, TWO = f"{T5_LENGTH}", f"{T5_LENGTH} and 256"
ARMS = {ONE: {}, TWO: {"model.extra_t5_lengths": [256]}}
BF16 = {"model.dtype": "bf16"}
"""Precision of trainings and images: half the time of fp32 on a CPU that supports it, with equal shares."""
PROMPTS = {T5_LENGTH: 72, 77: 24, 256: 24}
"""T5 length of the images -> number of prompts for the subject, and for other shapes."""

Figures = Mapping[str, Mapping[str, float]]
"""`arm/seed` -> `subject at 16`, `others at 16` and so on: shares of pictures that show their prompt."""


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    options = _parser().parse_args(arguments)
    file = options.out / "results" / "t5_lengths.json"
    results: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"figures": {}}
    pipelines = {length: ImagePipeline("nano", SAMPLER, t5_length=length, dtype=torch.bfloat16) for length in PROMPTS}
    with tempfile.TemporaryDirectory(prefix="sd3tune-lengths-") as folder:
        for seed in options.seeds:
            for arm, changes in ARMS.items():
                name = f"{arm}/{seed}"
                if name in results["figures"]:
                    continue
                run = Path(folder) / name.replace("/", "-").replace(" ", "-")
                recipe = replace(WITH_CLASS_IMAGES, changes={**WITH_CLASS_IMAGES.changes, **BF16, **changes})
                results["figures"][name] = _measure(recipe, run, Path(folder) / "store", seed, pipelines)
                results["environment"] = environment()
                write_json(file, results)
                if pairs(results["figures"]):
                    replace_between(options.out / "README.md", "t5 lengths", table(results))
                print(name, results["figures"][name], flush=True)
    return 0


def _measure(
    recipe: Variant, run: Path, store: Path, seed: int, pipelines: Mapping[int, ImagePipeline]
) -> dict[str, float]:
    """Train, and draw with the adapter at every length. `train_s` is the duration of the training in seconds."""
    shares = {"train_s": train_quietly(recipe, run, store, seed)}
    for length, pipeline in pipelines.items():
        subject = subject_tasks(PROMPTS[length], seed)
        others = plain_tasks(PROMPTS[length], held_out=False, seed=seed)
        images = pipeline.draw([(task.prompt, task.seed) for task in [*subject, *others]], run)
        shares[f"subject at {length}"] = share_right(subject, images[: len(subject)])
        shares[f"others at {length}"] = share_right(others, images[len(subject) :])
    return shares


def pairs(figures: Figures) -> list[str]:
    """Return the seeds with both trainings measured."""
    of = {arm: [seed for name in figures for at, seed in [name.split("/")] if at == arm] for arm in ARMS}
    return [seed for seed in of[ONE] if seed in of[TWO]]


def table(results: Mapping[str, Any]) -> str:
    """Return a Markdown table: means over the seeds, and mean paired differences with their 95 % interval."""
    figures: Figures = results["figures"]
    seeds = pairs(figures)
    prompts = ", ".join(f"{count} at {length} tokens" for length, count in PROMPTS.items())
    lines = [
        *provenance(results["environment"]),
        f"Seeds {', '.join(seeds)}; prompts for each share and seed: {prompts}.",
        "",
        f"| drawn at T5 length | | trained at {ONE}, % | trained at {TWO}, % | difference, points |",
        "| --- | --- | --- | --- | --- |",
    ]
    for length in PROMPTS:
        for what, title in (("subject", "subject right"), ("others", "other shapes right")):
            one, two = ([100 * figures[f"{arm}/{seed}"][f"{what} at {length}"] for seed in seeds] for arm in (ONE, TWO))
            means = (f"{statistics.mean(of):.1f}" for of in (one, two))
            difference = mean_and_half_width([b - a for a, b in zip(one, two, strict=True)], signed=True)
            lines.append(f"| {length} | {title} | {' | '.join(means)} | {difference} |")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.lengths", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="a pair of trainings for each")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent, help="folder of README.md, results/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
