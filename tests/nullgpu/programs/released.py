"""`released.py CONFIG KEY=VALUE ...`: load a run's base as `sd3tune train` does, and tell its bytes beside its plan's.

The GPU's memory is the machine's, so SD3.5-medium takes 3 GB of it.
"""

from __future__ import annotations

import sys

import torch

from sd3tune.config import load_config
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.run.preflight import make_plan
from sd3tune.run.setup import load_base
from tests.nullgpu.counts import fact


def main(config: str, overrides: list[str]) -> None:
    plan = make_plan(load_config(config, overrides).config, torch.device("cuda:0"), resume=False)
    side = plan.config.data.resolution
    transformer = load_base(plan)
    fact("allocated", torch.cuda.memory_allocated())
    fact("dtype", str(transformer.dtype))
    fact("devices", sorted({tensor.device.type for tensor in transformer.parameters()}))
    fact("planned", rehearse_training(plan.config, plan.base, plan.method, (side, side), plan.dtype).frozen)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
