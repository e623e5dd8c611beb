"""The training state at the first step of an attempt: new, initialised from data, or restored from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from sd3tune.config import Config
from sd3tune.model.compute.compiled import compile_blocks
from sd3tune.model.compute.sharding import mesh_of, shard_blocks
from sd3tune.run.batches import make_batches
from sd3tune.run.encoding import Encoded
from sd3tune.run.gradients import gradient_norms
from sd3tune.run.preflight import Plan
from sd3tune.run.setup import make_trainable
from sd3tune.runtime.processes import ALONE, Processes
from sd3tune.training.checkpoint import read_state, restore
from sd3tune.training.drift import DriftLimit
from sd3tune.training.flat_master import FlatMaster, LossScale
from sd3tune.training.fused_backward import FusedBackward
from sd3tune.training.optimizers import make_optimizer
from sd3tune.training.step import TrainState, predict_velocity

_OBSERVED_STEPS = 8
"""Number of batches for an initialisation from data."""


def starting_state(
    plan: Plan, encoded: Encoded, transformer: SD3Transformer2DModel, processes: Processes
) -> TrainState:
    """Make the model trainable, and return the state of the checkpoint to resume from, or of step 0."""
    config = plan.config
    shapes = {} if plan.start is None else read_state(plan.start)["layout"]
    plan.method.prepare(transformer, shapes, partial(gradient_norms, plan, encoded, transformer, processes))
    parameters = make_trainable(config, plan.method, transformer)
    master = _divide(plan, transformer, parameters) if processes.lockstep else None
    if plan.start is None:
        plan.method.initialize_from_data(
            transformer, lambda: _observe(plan, encoded, transformer), processes.reduce_mean
        )
    master = master or _flat_master(plan, parameters)
    state = make_state(config, master, plan.dtype)
    if plan.start is not None:
        restore(plan.start, state)
    if config.train.compile == "blocks":
        compile_blocks(transformer)
    return state


def _flat_master(plan: Plan, parameters: Mapping[str, nn.Parameter]) -> FlatMaster:
    method = plan.method
    return FlatMaster(
        parameters,
        plan.dtype,
        accumulates=not plan.config.train.fused_backward,
        rates=method.rates(parameters),
        segments=method.segments,
    )


def _divide(
    plan: Plan, transformer: SD3Transformer2DModel, parameters: Mapping[str, nn.Parameter]
) -> FlatMaster | None:
    """Divide the model, which is on the CPU, among the processes; return the master of a model that is trained whole.

    A method that freezes the base has undivided parameters; None is returned, and they are on the device.
    """
    mesh = mesh_of(plan.device)
    if plan.config.method.freezes_base:
        shard_blocks(transformer, mesh, plan.device, whole=parameters.values())
        for model in plan.method.companions():
            model.to(plan.device)
        return None
    from sd3tune.training.sharded_master import ShardedMaster  # its modules of torch take a second to import

    master = ShardedMaster(parameters, mesh, plan.device)
    for parameter in parameters.values():
        parameter.data = parameter.data.to(plan.dtype)
    shard_blocks(transformer, mesh, plan.device, whole=())
    master.attach(transformer)
    return master


def make_state(config: Config, master: FlatMaster, dtype: torch.dtype) -> TrainState:
    """Return the training state before the first step."""
    optimizer = make_optimizer(config.optimizer, master.master, master.named(master.master))
    limit = config.data.drift_limit
    return TrainState(
        step=0,
        master=master,
        optimizer=optimizer,
        ema=master.master.detach().clone() if config.ema is not None else None,
        loss_scale=LossScale(master.master.device, enabled=dtype is torch.float16),
        fused=FusedBackward(master, optimizer) if config.train.fused_backward else None,
        drift=None if limit is None else DriftLimit(limit, master.master.device),
    )


def _observe(plan: Plan, encoded: Encoded, transformer: SD3Transformer2DModel) -> None:
    """Run a single process's first batches through the model, so that every rank uses the same data."""
    batches = make_batches(plan, encoded, ALONE)
    for step in range(_OBSERVED_STEPS):
        predict_velocity(transformer, plan.method, batches.fetch(step, 0))
    batches.close()
