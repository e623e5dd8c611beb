"""Every optimizer teaches nano a new shape, in sixty steps of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd3tune.commands.demo import CONFIG, SAMPLER, T5_LENGTH
from sd3tune.commands.train import run_training
from sd3tune.config import parse_config
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.nano.tasks import share_right, subject_tasks
from sd3tune.training.optimizers import OPTIMIZERS

LEARNS = {
    "adamw": ({"lr": 3e-3}, 0.5),
    "adamw8bit": ({"lr": 3e-3}, 0.5),
    "prodigy": ({"d0": 3e-4}, 0.25),
    "lion": ({"lr": 1e-3}, 0.4),
    "muon": ({"lr": 1e-2}, 0.4),
    "adafactor": ({"lr": 3e-2, "smallest_scale": 0.1}, 0.5),
    "schedulefree": ({"lr": 1e-2}, 0.5),
    "paged_adamw8bit": ({"lr": 3e-3}, 0.5),
}
"""Settings, and the least share of right pictures; one seed each, so they rank no optimizer."""


def test_every_optimizer_has_a_floor() -> None:
    assert LEARNS.keys() == OPTIMIZERS.keys()


@pytest.mark.long  # 20 s of CPU for each
@pytest.mark.parametrize("kind", LEARNS)
def test_it_teaches_a_shape_that_the_base_does_not_know(kind: str, tmp_path: Path) -> None:
    settings, floor = LEARNS[kind]
    optimizer = {"kind": kind, **settings}
    values = {**CONFIG, "output_dir": str(tmp_path / "run"), "optimizer": optimizer}
    run_training(parse_config({**values, "train": {"steps": 60, "batch_size": 6}}).config)
    tasks, pipeline = subject_tasks(24, seed=0), ImagePipeline("nano", SAMPLER, t5_length=T5_LENGTH)
    wanted = [(task.prompt, task.seed) for task in tasks]
    assert share_right(tasks, pipeline.draw(wanted)) == 0
    assert share_right(tasks, pipeline.draw(wanted, tmp_path / "run" / "adapter")) >= floor
