"""The processes that train together, and their collective operations, from accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """The processes that train together; with one of them, both functions return what they are given."""

    rank: int
    world: int
    reduce_mean: Callable[[Tensor], Tensor]
    gather: Callable[[Tensor], Tensor]
    """[...] of each rank -> [world, ...]."""
    wait: Callable[[], None]

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = Processes(0, 1, lambda tensor: tensor, lambda tensor: tensor[None], lambda: None)
"""A single process: none of the collective operations does anything."""


def processes_of(accelerator: Accelerator) -> Processes:
    """The collective operations that training needs."""
    if accelerator.num_processes == 1:
        return ALONE
    return Processes(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        reduce_mean=lambda tensor: accelerator.reduce(tensor, reduction="mean"),
        gather=lambda tensor: accelerator.gather(tensor[None]),
        wait=accelerator.wait_for_everyone,
    )


@contextlib.contextmanager
def closing_process_group() -> Iterator[None]:
    """Leave a process group that the body joined, which torch warns about otherwise."""
    joined_before = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        yield
    finally:
        if not joined_before and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
