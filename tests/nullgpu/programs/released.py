"""`released.py CONFIG KEY=VALUE ...`: load a run's base as `sd3tune train` does, and tell its bytes beside its plan's.

The GPU's memory is reserved from the machine's, but large copies to it are not made. The highest number of bytes that
only this process holds, sampled while it loads, is its use of system memory.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from pathlib import Path

import torch

from sd3tune.config import load_config
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.forecast.system import system_memory
from sd3tune.run.preflight import make_plan
from sd3tune.run.setup import load_base
from tests.nullgpu.counts import fact


class SystemMemory(threading.Thread):
    """The most bytes that this process has held more than at first, without pages mapped from files."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before, self.added = self.held(), 0
        self.start()

    @staticmethod
    def held() -> int:
        found = re.search(r"^RssAnon:\s*(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        return 1024 * int(found[1]) if found else 0

    def run(self) -> None:
        while True:
            self.added = max(self.added, self.held() - self.before)
            time.sleep(0.005)


def main(config: str, overrides: list[str]) -> None:
    plan = make_plan(load_config(config, overrides).config, torch.device("cuda:0"), resume=False)
    side = plan.config.data.resolution
    torch.cuda.init()
    seen = SystemMemory()
    transformer = load_base(plan)
    fact("system", seen.added)
    fact("planned_system", system_memory(forecast(forecast_inputs(plan.config, plan.dtype)), False).phases["train"])
    fact("allocated", torch.cuda.memory_allocated())
    fact("dtype", str(transformer.dtype))
    fact("devices", sorted({tensor.device.type for tensor in transformer.parameters()}))
    fact("planned", rehearse_training(plan.config, plan.base, plan.method, (side, side), plan.dtype).frozen)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
