"""`python -m benchmarks.quality.rates`: effects of learning rates from normal to far too high on an adapter of nano.

The demo's recipe without class images, one run per rate. Prints the change of a denoising step, the loss on training
images, and the shares of pictures that show their prompt; the table in docs/results.md is from it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sd3tune.commands.demo import CONFIG, SAMPLER, T5_LENGTH
from sd3tune.commands.train import run_training
from sd3tune.config import parse_config
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.nano.tasks import plain_tasks, share_right, subject_tasks

RATES = (1e-4, 3e-4, 1e-3, 2e-3, 4e-3, 1e-2, 3e-2, 0.1, 1.0, 10.0)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--pictures", type=int, default=16, help="Of the subject, and as many of other shapes.")
    options = parser.parse_args(arguments)
    pipeline = ImagePipeline("nano", SAMPLER, t5_length=T5_LENGTH)
    subject = subject_tasks(options.pictures, seed=1)
    others = plain_tasks(options.pictures, held_out=False, seed=3)
    for rate in options.rates:
        with tempfile.TemporaryDirectory(prefix="sd3tune-rates-") as folder:
            run = Path(folder) / "run"
            run_training(parse_config({**CONFIG, "output_dir": str(run)}, [f"optimizer.lr={rate}"]).config)
            report = json.loads((run / "run.json").read_text(encoding="utf-8"))["report"]
            images = pipeline.draw([(task.prompt, task.seed) for task in [*subject, *others]], run)
        losses = report["fixed_noise_loss"]["trained"]
        print(
            f"lr {rate:g}: a step changes by {report['velocity_change']:.0%}, loss {sum(losses) / len(losses):.3f}, "
            f"subject right {share_right(subject, images[: len(subject)]):.0%}, "
            f"other shapes right {share_right(others, images[len(subject) :]):.0%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
