from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config import Config
from sd3tune.data.sampler import generator
from sd3tune.methods import Method
from sd3tune.model.load.components import load_transformer
from sd3tune.run.batches import make_batches
from sd3tune.run.encoding import Encoded, encode
from sd3tune.run.preflight import Plan, make_plan
from sd3tune.run.state import make_state
from sd3tune.runtime.processes import ALONE
from sd3tune.training.batches import Batches
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.objective import Objective, make_objective
from sd3tune.training.step import StepResult, TrainState, train_step


@dataclass
class Training:
    """The parts of a run, put together as `sd3tune train` does, for tests that take single steps."""

    config: Config
    plan: Plan
    encoded: Encoded
    transformer: SD3Transformer2DModel
    method: Method
    parameters: dict[str, nn.Parameter]
    state: TrainState
    batches: Batches
    objective: Objective
    reduce_mean: Callable[[Tensor], Tensor] = ALONE.reduce_mean

    def step(self) -> StepResult:
        return train_step(
            self.state,
            self.transformer,
            self.method,
            self.batches,
            self.objective,
            self.config,
            self.reduce_mean,
        )


@pytest.fixture
def assembled() -> Iterator[Callable[[Config], Training]]:
    """`assembled(config)`: a `Training` at its start."""
    with ExitStack() as stack:

        def assemble(config: Config) -> Training:
            plan = make_plan(config, torch.device("cpu"), resume=False)
            encoded = encode(plan, ALONE, lambda line: None)
            transformer = load_transformer(plan.base, plan.dtype)
            parameters = plan.method.inject(transformer, lambda name: generator(config.seed, "init", name))
            rates, segments = plan.method.rates(parameters), plan.method.segments
            master = FlatMaster(parameters, plan.dtype, rates=rates, segments=segments)
            state = make_state(config, master, plan.dtype)
            batches = make_batches(plan, encoded, ALONE)
            stack.callback(batches.close)
            objective = make_objective(config.flow, plan.shift, plan.shifts)
            return Training(config, plan, encoded, transformer, plan.method, parameters, state, batches, objective)

        yield assemble
