"""The first import of a job passes without a garbage collection, and leaves the collector as it was."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest

from sd3tune.cli.imports import quick_imports, spin_briefly

FIRST_IMPORT = """
import gc
from sd3tune.cli.imports import quick_imports

before = [of["collections"] for of in gc.get_stats()]
with quick_imports("train run.yaml"):
    import sd3tune.commands.train
after = [of["collections"] for of in gc.get_stats()]
print(after == before, gc.isenabled(), gc.get_freeze_count() > 100_000)

import sys
print(*sorted(UNUSED & set(sys.modules)))

import torch
from sd3tune.model.lora.layers import Layer, inject_lora, lora_layers
from sd3tune.model.load.quantized import quantize
from sd3tune.model.base.tiny import _transformer

transformer = _transformer("sd3")
quantize(transformer, transformer.transformer_blocks[0], "nf4", "cpu")
names = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]
inject_lora(transformer, {name: Layer(4, 4.0) for name in names}, lambda name: torch.Generator())
print(*(type(layer).__name__ for layer in lora_layers(transformer).values()))
"""
UNUSED = {
    "bitsandbytes",
    "datasets",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "tensorboard",
    "transformers.models.clip.modeling_clip",
    "transformers.models.t5.modeling_t5",
    "wandb",
}


@pytest.mark.long
def test_the_first_import_collects_no_garbage_and_takes_only_what_every_run_needs() -> None:
    script = f"UNUSED = {UNUSED!r}\n{FIRST_IMPORT}"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    collector, imported, layers = ran.stdout.splitlines()
    assert collector.split() == ["True", "True", "True"]
    assert imported.split() == []
    assert ran.stderr == "train run.yaml: loading PyTorch and diffusers ...\n"
    assert layers.split() == ["Linear4bit", "Linear"]  # they are found when they are asked for


def test_where_all_is_imported_garbage_of_others_stays_collectable() -> None:
    import diffusers  # noqa: F401

    frozen = gc.get_freeze_count()
    with quick_imports("train run.yaml"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


@pytest.mark.parametrize(
    ("given", "spins"),
    [
        ({}, "10000"),
        ({"OMP_WAIT_POLICY": "active"}, None),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_NUM_THREADS": "2"}, "10000"),
    ],
)
def test_waiting_threads_sleep_soon_unless_the_environment_says_otherwise(monkeypatch, given, spins) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    environment = dict(os.environ)
    monkeypatch.setattr(os, "environ", environment)
    spin_briefly()
    assert environment.get("GOMP_SPINCOUNT") == spins
