"""`capability.py FOLDER NAME ...`: train on tiny in the settings of `RUNS`, with the precision that suits this GPU.

Each tells facts: the dtype, the loss scale's device (None if it does not scale), and of six steady steps what the host
waited for and the launched kernels. The results that a run judges are replaced as in `matrix.py`.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.training.flat_master import LossScale
from sd3tune.training.loop import View
from tests.nullgpu.counts import counting, fact
from tests.nullgpu.programs.matrix import ROOT, with_results

STEADY = (3, 9)
STEPS = STEADY[1] + 2
COMMON = (f"train.steps={STEPS}", f"train.log_every={STEPS}", f"checkpoint.every={STEPS}", "preview.steps=2")
ON_TINY = ("model.base=tiny", "model.dtype=auto", "data.resolution=64")
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "preset": (
        "sd35_medium_t4.yaml",
        (*ON_TINY, "data.sources.0.path=sd3tune/assets/demo", "schedule.warmup_steps=2", f"preview.every={STEPS}"),
    ),
    "nf4": (
        "tiny_smoke.yaml",
        ("model.quantize=nf4", "optimizer={kind: adamw8bit}", "train.gradient_checkpointing=selective"),
    ),
}


def main(folder: Path, names: list[str]) -> None:
    with_results()
    for name in names:
        preset, settings = RUNS[name]
        found = train(ROOT / "configs" / preset, [*COMMON, *settings, f"output_dir={folder / name}"])
        fact(name, found)


def train(preset: Path, overrides: list[str]) -> dict[str, object]:
    found: dict[str, object] = {}
    counted = ExitStack()
    update = LossScale.update

    def observed(self: LossScale, overflow: Tensor) -> None:
        found["scales on"] = overflow.device.type if self.enabled else None
        update(self, overflow)

    def watch(view: View) -> None:
        if view.step == STEADY[0]:
            found["seen"] = counted.enter_context(counting())
        elif view.step == STEADY[1]:
            counted.close()
            found["dtype"] = str(view.transformer.dtype)

    LossScale.update = observed  # type: ignore[method-assign]
    loaded = load_config(preset, overrides)
    run_training(loaded.config, loaded.notes, callbacks=[watch])
    LossScale.update = update  # type: ignore[method-assign]
    seen = found.pop("seen")
    return {**found, "waits": dict(seen.waits), "pageable": seen.pageable, "kernels": list(seen.kernels)}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
