"""`steady.py FOLDER NAME ...`: count steps of `sd3tune train` on tiny, in the settings of `TRAININGS`.

Each tells as a fact what `Seen.steady` found: the empty string, or host waits and pageable copies with their lines.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

from sd3tune.commands import train as command
from sd3tune.config import load_config
from sd3tune.training.loop import View
from tests.nullgpu.counts import Seen, counting, fact
from tests.nullgpu.programs.matrix import ROOT, TEXT, with_results

COMMON = ("train.log_every=1", "train.steps=8", "preview.prompts=[]", "checkpoint.every=100")
FIRST, LAST = 3, 6
"""The steps between which is counted: after the first ones, which set up, and before the last, which is saved."""

TRAININGS: dict[str, tuple[str, ...]] = {
    "none": ("train.gradient_accumulation=2", "method.dropout=0.1", "data.caption_dropout=0.3"),
    "selective": ("train.gradient_checkpointing=selective", "flow.noise_offset=0.1"),
    "block": ("train.gradient_checkpointing=block", "data.sources.0.prior={kind: prediction, prompt: a photo}"),
    "plain": ("train.fast_path=false", "train.hoist=false"),
    "fp16": ("model.dtype=fp16",),
    "text": (TEXT, "train.batch_size=3", "data.caption_dropout=0.3", "data.encoder_dropout=0.3"),
    "nf4": ("model.quantize=nf4",),
    "int8": ("model.quantize=int8",),
    "full": ("method={kind: full}",),
    "swap": ("train.swap_blocks=4",),
    "swap in nf4": ("train.swap_blocks=3", "model.quantize=nf4"),
    "fused": ("method={kind: full}", "train.fused_backward=true", "train.max_grad_norm=null"),
}


def main(folder: Path, names: list[str]) -> None:
    with_results()
    for name in names:
        fact(name, found(count(folder / name, *TRAININGS[name])))


def count(run: Path, *overrides: str) -> Seen:
    """Return the counts of the steps after `FIRST`, up to `LAST`."""
    with ExitStack() as stack:
        seen: list[Seen] = []

        def watch(view: View) -> None:
            if view.step == FIRST:
                seen.append(stack.enter_context(counting()))
            elif view.step == LAST:
                stack.close()

        loaded = load_config(ROOT / "configs" / "tiny_smoke.yaml", [*COMMON, *overrides, f"output_dir={run}"])
        command.run_training(loaded.config, callbacks=[watch])
    return seen[0]


def found(seen: Seen) -> str:
    assert seen.launches > 0
    try:
        seen.steady()
    except AssertionError as waits:
        return str(waits)
    return ""


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
