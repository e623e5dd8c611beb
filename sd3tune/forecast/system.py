"""The forecast of system memory: what a process of a run takes of it, beside the GPU's memory.

Weights that are stored in the run's precision are mapped from their file, and take less: the system can drop them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from sd3tune.forecast.footprint import bytes_of, tensors_of
from sd3tune.forecast.forecast import LABELS, Forecast
from sd3tune.forecast.optimizer_memory import MemoryUse
from sd3tune.methods import METHODS
from sd3tune.model.compute.hoist import hoist
from sd3tune.model.compute.swap import stored_bytes
from sd3tune.model.load.components import load_transformer, load_vae, text_encoder_shape, vae_dtype
from sd3tune.model.load.quantized import load_transformer_in
from sd3tune.run.setup import hoists

PROCESS = 2_000_000_000
"""Bytes of Python, PyTorch and CUDA's libraries: an allowance, not a measurement."""
_META = torch.device("meta")


@dataclass(frozen=True)
class SystemMemory:
    """System memory of one process, in bytes."""

    phases: dict[str, int]
    """By phase, as in `Forecast.phases`, and for T5 also if it is on the CPU; without `PROCESS`."""

    @property
    def needed(self) -> int:
        return max(self.phases.values()) + PROCESS

    def rows(self, plan: Forecast) -> list[tuple[str, MemoryUse, int]]:
        """Return each phase with its memory, zero for T5 on the CPU, and its system memory."""
        nothing = MemoryUse(0, 0)
        return [(name, plan.phases.get(name, nothing), nbytes) for name, nbytes in self.phases.items()]

    def describe(self) -> str:
        worst = max(self.phases, key=self.phases.__getitem__)
        return (
            f"system    {self.needed / 1e9:.2f} GB of system memory: {worst}; with {PROCESS / 1e9:g} GB for Python, "
            "PyTorch and CUDA (an allowance)"
        )

    def problems(self, available: int) -> list[str]:
        """Return a line if the machine, with `available` bytes, has less; else none."""
        if self.needed <= available:
            return []
        worst = max(self.phases, key=self.phases.__getitem__)
        return [
            f"warning: this machine has {available / 1e9:.3g} GB of system memory, and to {worst} the run may take "
            f"{self.needed / 1e9:.3g} GB; close other programs, add swap space, or use a machine with more"
        ]


def machine_memory() -> int:
    """Return the bytes of this machine's system memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def system_memory(plan: Forecast, on_the_cpu: bool) -> SystemMemory:
    """Return the system memory of a run that trains on a GPU or, with `on_the_cpu`, of one that has none."""
    loaded = _loaded(plan)
    model, kept, largest = _transformer(plan)
    training = plan.training
    # In fp32 for the master and the report; for previews, trained and untrained weights in 16 bits.
    exact = 0 if plan.inputs.config.method.freezes_base else 4 * training.parameters
    copied = training.master + training.optimizer + training.average  # for a checkpoint
    found = dict(loaded)
    if plan.drawing is not None:
        found["draw class images"] = model
    if on_the_cpu:
        found |= {name: max(found.get(name, 0), use.peak) for name, use in plan.phases.items()}
        found["train"] = max(found["train"] + kept, model, training.resident + kept + exact)
    else:
        t5 = loaded.get(f"encode {LABELS['t5']}", 0)
        stays = t5 if plan.inputs.config.data.streams and plan.inputs.config.model.t5_device == "cpu" else 0
        found["train"] = max(model + largest, exact, copied + kept) + stays
    if training.preview is not None:
        vae = loaded[f"encode {LABELS['vae']}"]
        found["preview"] = kept + (plan.phases["preview"].peak if on_the_cpu else max(vae, exact))
    return SystemMemory(found)


def _loaded(plan: Forecast) -> dict[str, int]:
    """Return the bytes of each component that encodes, by phase: it is loaded whole, and quantised afterwards."""
    base, dtype, found = plan.inputs.base, plan.inputs.dtype, {}
    for name, use in plan.encoding.items():
        is_vae = name == "vae"
        whole = load_vae(base, vae_dtype(dtype), _META) if is_vae else text_encoder_shape(base, name, dtype)
        computes_here = name == "t5" and plan.inputs.config.model.t5_device == "cpu"
        found[f"encode {LABELS[name]}"] = max(bytes_of(tensors_of(whole)), use.peak if computes_here else 0)
    return found


def _transformer(plan: Forecast) -> tuple[int, int, int]:
    """Return bytes of the transformer: of all its tensors, of those that stay, and of the largest swapped block.

    Hoisted layers and swapped blocks stay in system memory.
    """
    inputs, config = plan.inputs, plan.inputs.config
    transformer = load_transformer(inputs.base, inputs.dtype, _META)
    model = bytes_of(tensors_of(transformer))
    modules = METHODS[config.method.kind](config, inputs.base).select(transformer)
    prepare = hoist if hoists(config, modules) else None
    if prepare is not None:
        prepare(transformer)
    hoisted = model - bytes_of(tensors_of(transformer))
    stored = []
    if config.train.swap_blocks is not None:
        if config.model.quantize != "none":
            transformer = load_transformer_in(config.model.quantize, inputs.base, inputs.dtype, _META, prepare)
        stored = stored_bytes(transformer, config.train.swap_blocks)
    return model, hoisted + sum(stored), max(stored, default=0)
