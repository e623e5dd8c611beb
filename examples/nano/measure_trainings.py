"""Validate nano's CLIP on trainings: does it rank them as the oracle does?

python -m examples.nano.measure_trainings sd3tune/assets/nano_clip --out data/nano/trainings

LoRAs of the heart are trained for several numbers of steps and at several learning rates, and draw the same prompts.
Finished trainings are kept, so a stopped measurement continues.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from examples.nano.measure_clip import Clip, rank_correlation, similarity
from sd3tune.commands.demo import CONFIG, SAMPLER, T5_LENGTH
from sd3tune.commands.train import run_training
from sd3tune.config import parse_config
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.nano.tasks import INSTANCES, share_right, subject_tasks
from sd3tune.nano.world import CLASS, SUBJECT, render

TRAININGS = ((1e-3, (10, 25, 40, 60, 100, 250)), (3e-4, (40, 100, 250)), (3e-3, (40, 250)))
"""(learning rate, numbers of steps)"""
SEED = 300


def train(out: Path, learning_rate: float, steps: int) -> Path:
    """Return the run folder of a training, which is run unless it is finished."""
    values = copy.deepcopy(CONFIG)
    values |= {"output_dir": str(out / f"{learning_rate:g}-{steps}"), "optimizer": {"lr": learning_rate}}
    values["train"]["steps"] = steps
    run = Path(values["output_dir"])
    if not (run / "adapter").is_dir():
        run_training(parse_config(values).config, resume=True)
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.measure_trainings", description=__doc__)
    parser.add_argument("clip", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--pictures", type=int, default=32, help="of each training")
    parser.add_argument("--guidance", type=float, default=2.0)
    options = parser.parse_args(arguments)
    clip = Clip(options.clip)
    pipeline = ImagePipeline("nano", replace(SAMPLER, guidance=options.guidance), t5_length=T5_LENGTH)
    tasks = subject_tasks(options.pictures, SEED)
    photos = [render(scene, seed) for seed, scene in enumerate(INSTANCES)]
    prompts = clip.texts([task.scene.caption for task in tasks])
    classes = clip.texts([task.scene.caption.replace(SUBJECT, CLASS) for task in tasks])
    rows = []
    runs = [(f"{rate:g}, {steps} steps", train(options.out, rate, steps)) for rate, many in TRAININGS for steps in many]
    for name, run in [("no adapter", None), *runs]:
        pictures = pipeline.draw([(task.prompt, task.seed) for task in tasks], run)
        seen = clip.images(pictures)
        row = (
            share_right(tasks, pictures),
            similarity(clip, pictures, photos),
            float((seen * prompts).sum(-1).mean()),
            float((seen * classes).sum(-1).mean()),
        )
        rows.append(row)
        print(
            f"{name:18} oracle {row[0]:.2f}  CLIP-I {row[1]:.3f}  CLIP-T {row[2]:.3f}, class {row[3]:.3f}", flush=True
        )
    columns = list(zip(*rows, strict=True))
    of_images, of_texts = (rank_correlation(columns[0], columns[n]) for n in (1, 2))
    print(f"rank correlation with the oracle over {len(rows)} rows: CLIP-I {of_images:.2f}, CLIP-T {of_texts:.2f}")


if __name__ == "__main__":
    main()
