"""`matrix.py FOLDER NAME ...`: train on tiny in the settings of `TRAININGS`, and draw with what was trained.

Each tells a fact, with the rank if there are several: `MADE`, or its error. A kernel computes nothing, so what the host
reads is zero. `with_results` replaces the few results that a run judges: the losses that are compared, whether the
product changes anything, and the trial of an 8-bit optimizer.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sd3tune.commands import train as command
from sd3tune.commands.infer import run_infer
from sd3tune.config import load_config
from sd3tune.errors import Interrupted
from sd3tune.inference.job import InferenceJob
from sd3tune.methods.full import FullMethod
from sd3tune.run import optimizer_fallback, report
from sd3tune.run.callbacks import validation
from sd3tune.training.loop import View
from tests.nullgpu.counts import fact

ROOT = Path(__file__).parents[3]
MADE = "made"
COMMON = ("train.steps=3", "train.log_every=1", "checkpoint.every=2", "preview.every=2", "preview.steps=2")
LOOKING = ("validation={holdout: 2, every: 2}", "data.caption_dropout=0.3", "data.encoder_dropout=0.2")
IMAGES = "data.sources.0.prior={kind: images, prompt: a photo, images: 2, steps: 2}"
PREDICTION = "data.sources.0.prior={kind: prediction, prompt: a photo}"

TEXT = "method.text_encoders={clip_l: {}, clip_g: {targets: attention+mlp}}"
WORDS = "method={kind: textual_inversion, token: robot, vectors: 2, init: photo}"

TRAININGS: dict[str, tuple[str, ...]] = {
    "lora": (*LOOKING, IMAGES, "train.gradient_accumulation=2"),
    "selective": ("train.gradient_checkpointing=selective", PREDICTION, "flow.noise_offset=0.1"),
    "block": ("train.gradient_checkpointing=block", "flow.loss={kind: huber}", "flow.weighting={kind: min_snr}"),
    "text": (TEXT, *LOOKING, PREDICTION, "optimizer={kind: adamw8bit}"),
    "words": (WORDS, *LOOKING, PREDICTION),
    "fp16": ("model.dtype=fp16", "ema=null", "method.init=orthogonal"),
    "plain": ("model.dtype=fp32", "train.fast_path=false", "train.hoist=false", "method.dropout=0.1"),
    "nf4": ("model.quantize=nf4", "optimizer={kind: adamw8bit}", "train.gradient_checkpointing=selective"),
    "int8": ("model.quantize=int8", "model.t5_quantize=int8", "optimizer={kind: prodigy}"),
    "full": ("method={kind: full}", *LOOKING, "train.gradient_checkpointing=block"),
    "full8": ("method={kind: full}", "optimizer={kind: adamw8bit}", PREDICTION, "model.dtype=fp16"),
    "fused8": (
        *("method={kind: full}", "optimizer={kind: adamw8bit}"),
        *("train.fused_backward=true", "train.max_grad_norm=null"),
    ),
    "swap": ("train.swap_blocks=3", IMAGES, *LOOKING, "train.gradient_checkpointing=block"),
    "scratch": ("method={kind: full}", "model.init=random", "ema=null"),
    "auto": ("train.memory=auto", "model.t5_device=cpu"),
    "dora": ("method={kind: dora, rank: auto, budget_mb: 0.1, loraplus_lr_ratio: 16}", "model.quantize=int8"),
    "loha": ("method={kind: loha}", "train.gradient_checkpointing=selective"),
    "lokr": ("method={kind: lokr, export_dtype: bf16}", "train.swap_blocks=3"),
    "sd3": ("model.base=tiny-sd3", "method.init=eva", "method.targets=attention+mlp"),
    "large": ("model.base=tiny-sd35-large", "method.targets=re:.*norm1\\.linear"),
}
DRAWINGS: dict[str, dict[str, object]] = {
    "infer": {},
    "infer offloaded in 4 bits": {"quantize": "nf4", "offload": True, "t5_8bit": True, "vae_tiling": True},
    "infer three at once": {"num": 3, "batch": 2, "sampler": "dpmpp"},
    "infer with skipped layers": {"sampler": "heun", "slg": 2.5, "slg_layers": (1,), "dtype": "fp16"},
}


def with_results() -> None:
    def loss_of_one(velocity: Tensor, target: Tensor, weights: Tensor | None) -> Tensor:
        return torch.ones(len(velocity)).to((velocity - target).device)

    def report_of_a_change(*arguments: Any) -> dict[str, Any]:
        return {**report.closing_report(*arguments), "changes_output": True}

    def zeros_for_export(method: FullMethod, value: Tensor) -> Tensor:
        exported = value.to(method.export_dtype)  # a large one is not copied from the GPU, and any number would be left
        return torch.zeros(exported.shape, dtype=exported.dtype)

    FullMethod._for_export = zeros_for_export  # type: ignore[method-assign]
    validation.velocity_loss = loss_of_one
    report._losses = lambda velocities, probes: [1.0 for _ in probes]
    command.closing_report = report_of_a_change
    optimizer_fallback._probe = lambda settings, device: None


def main(folder: Path, names: list[str]) -> None:
    with_results()
    gc.collect()
    gc.freeze()  # a run collects after every component, and need not look at the libraries
    for name in names:
        if name == "resume":
            tell(name, lambda name=name: stopped_and_resumed(folder / name))
        elif name in DRAWINGS:
            tell(name, lambda name=name: drawn(folder, **DRAWINGS[name]))
        else:
            tell(name, lambda name=name: train(folder / name, *TRAININGS[name]))


def tell(name: str, do: Callable[[], object]) -> None:
    if "RANK" in os.environ:
        name = f"{name} {os.environ['RANK']}"
    try:
        do()
    except Exception as error:
        last = " < ".join(f"{at.filename}:{at.lineno}" for at in traceback.extract_tb(error.__traceback__)[:-6:-1])
        fact(name, f"{type(error).__name__}: {error} ({last})")
    else:
        fact(name, MADE)


def train(run: Path, *overrides: str, resume: bool = False, stop: int = 0) -> None:
    def stopping(view: View) -> None:
        if view.step == stop:
            raise KeyboardInterrupt

    loaded = load_config(ROOT / "configs" / "tiny_smoke.yaml", [*COMMON, *overrides, f"output_dir={run}"])
    command.run_training(loaded.config, loaded.notes, resume=resume, callbacks=[stopping] if stop else [])


def stopped_and_resumed(run: Path) -> None:
    with pytest.raises(Interrupted, match="step-000002"):
        train(run, *TRAININGS["lora"], stop=2)
    train(run, *TRAININGS["lora"], resume=True)


def drawn(folder: Path, **options: object) -> None:
    adapter = folder / "lora" / "adapter"
    asked = {"steps": 2, **options}
    run_infer(InferenceJob.from_fields(loras=[str(adapter)], prompt="a cat", out=folder / "images", **asked))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
