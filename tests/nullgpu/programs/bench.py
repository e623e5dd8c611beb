"""The benchmark on a GPU, with its own arguments; the example looks its timesteps up by value, which are zero here."""

import sys

from torch import Tensor, dtype

from benchmarks.gpu.run import main
from benchmarks.gpu.sides import Example


def first_timesteps(self: Example, batch: int, dtype: dtype) -> tuple[Tensor, Tensor]:
    timesteps, sigmas = (values[:batch].to(self.device) for values in (self.scheduler.timesteps, self.scheduler.sigmas))
    return timesteps, sigmas.to(dtype)[:, None, None, None]


if __name__ == "__main__":
    Example._timesteps = first_timesteps
    sys.exit(main(sys.argv[1:]))
