"""The trainer's side: everything that `sd3tune train` runs per step, on a store of random entries on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from benchmarks.cells import BATCH_SIZE, CLIP_TOKENS, RANK, T5_TOKENS, Cell, Model
from sd3tune.config import Config
from sd3tune.data.sampler import generator
from sd3tune.data.store import Store, key
from sd3tune.methods import LoraMethod, Method
from sd3tune.model.compute.hoist import hoist
from sd3tune.run.setup import hoists, make_trainable
from sd3tune.run.state import make_state
from sd3tune.runtime.device import DTYPES, make_accelerator
from sd3tune.runtime.processes import ALONE, Processes, processes_of
from sd3tune.training.ahead import with_modulations
from sd3tune.training.batches import Batches, BatchSource, LatentScaling
from sd3tune.training.examples import Example
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.loop import Callback, train
from sd3tune.training.objective import Objective, make_objective, sigma_of_u
from sd3tune.training.step import StepResult, TrainState, train_step

IMAGES = 16
SHIFT = 3.0
SD3_SCALING = LatentScaling(scaling_factor=1.5305, shift_factor=0.0609)


def make_config(cell: Cell) -> Config:
    """Return the default configuration with other sizes, effective clipping, and metrics flushed at least as often."""
    return Config.model_validate(
        {
            "name": cell.name,
            "model": {"dtype": cell.dtype, "max_sequence_length": T5_TOKENS},
            "method": {"kind": "lora", "rank": RANK, "alpha": float(RANK)},
            "data": {"sources": [{"kind": "folder", "path": "random"}]},
            "train": {"batch_size": BATCH_SIZE, "max_grad_norm": 0.01, "log_every": cell.steps},
            "checkpoint": {"every": 10**9},
        }
    )


def fill_store(store: Store, model: Model, t5_shape: tuple[int, int], dtype: torch.dtype) -> list[Example]:
    """Write random moments and embeddings in the real layout, an image and a caption per example."""
    side = model.latent_side
    shapes = {encoder: (CLIP_TOKENS, width) for encoder, width in model.clip_widths.items()}
    shapes["t5"] = t5_shape

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source)

    examples = []
    with store.writer() as writer:
        for number in range(IMAGES):
            source = generator(0, "store", number)
            image = key("image", number=number)
            writer.put(image, {"mean": draw(16, side, side), "std": 0.1 * draw(16, side, side).abs()})
            captions = {encoder: key("text", encoder=encoder, number=number) for encoder in shapes}
            for encoder, shape in shapes.items():
                entry = {"hidden": draw(*shape).to(dtype)}
                if encoder != "t5":
                    entry["pooled"] = draw(shape[1]).to(dtype)
                writer.put(captions[encoder], entry)
            examples.append(Example(f"{number}.png", (image,), captions, (8 * side, 8 * side)))
    return examples


@dataclass
class Trainer:
    """The arguments of `sd3tune.training.loop.train`."""

    config: Config
    run: Path
    state: TrainState
    transformer: SD3Transformer2DModel
    method: Method
    batches: Batches
    ahead: BatchSource
    """`batches`, with modulations if they are computed ahead."""
    objective: Objective
    processes: Processes

    @property
    def device(self) -> torch.device:
        return self.batches.device

    def step(self) -> StepResult:
        """Take one step outside the loop."""
        return train_step(
            self.state,
            self.transformer,
            self.method,
            self.ahead,
            self.objective,
            self.config,
            self.processes.reduce_mean,
        )

    def train(self, until: int, callback: Callback) -> None:
        """Run the real loop from the current step to `until`."""
        length = self.config.train.model_copy(update={"steps": until})
        train(
            config=self.config.model_copy(update={"train": length}),
            run=self.run,
            state=self.state,
            transformer=self.transformer,
            method=self.method,
            batches=self.ahead,
            objective=self.objective,
            processes=self.processes,
            identity={},
            contract={},
            callbacks=[callback],
        )


def make_trainer(config: Config, model: Model, folder: Path, device: torch.device | None = None) -> Trainer:
    """Return the trainer before its first step, with nonzero factors B, so that A has a gradient.

    `config.model.dtype` must not be `auto`. `device` defaults to a run's device.
    """
    dtype = DTYPES[config.model.dtype]
    processes = ALONE
    if device is None:
        accelerator = make_accelerator()
        processes, device = processes_of(accelerator), accelerator.device
    transformer = model.build(dtype).to(device)
    method = LoraMethod(config)
    if hoists(config, method.select(transformer)):
        hoist(transformer)
    parameters = make_trainable(config, method, transformer)
    for name, parameter in parameters.items():
        if name.endswith(".lora_B"):
            parameter.data.normal_(std=0.02, generator=generator(config.seed, name, device=device))
    store, sigmas = Store(folder / "store"), sigma_of_u(config.flow, SHIFT)
    batches = Batches(
        store,
        fill_store(store, model, (config.model.max_sequence_length, transformer.config.joint_attention_dim), dtype),
        seed=config.seed,
        batch_size=config.train.batch_size,
        accumulation=1,
        rank=processes.rank,
        world=processes.world,
        device=device,
        scaling=SD3_SCALING,
        sigma_of=lambda u, pixels: sigmas(u),
    )
    return Trainer(
        config=config,
        run=folder / "run",
        state=make_state(config, FlatMaster(parameters, dtype), dtype),
        transformer=transformer,
        method=method,
        batches=batches,
        ahead=with_modulations(batches, transformer, method),
        objective=make_objective(config.flow, SHIFT),
        processes=processes,
    )
