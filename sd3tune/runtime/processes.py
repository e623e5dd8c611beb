"""The processes of a training, and their collective operations, with accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

from sd3tune.errors import RunError
from sd3tune.runtime.arrivals import arrive, missing_ranks, naming_missing_ranks

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Rank, world size and collective operations of the processes that train together."""

    rank: int
    world: int
    reduce_mean: Callable[[Tensor], Tensor]
    """Average a contiguous tensor over the ranks, in place; return it."""
    gather: Callable[[Tensor], Tensor]
    """Tensor [...] of each rank -> [world, ...] on every rank."""
    wait: Callable[[], None]
    exchange: Callable[[Any], list[Any]] = lambda value: [value]
    """A small value of each rank, such as a text or a number -> the values of all, on every rank."""
    lockstep: bool = False
    """True if every rank must take part in each forward pass, as the model is divided among them."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0


ALONE = Processes(0, 1, lambda tensor: tensor, lambda tensor: tensor[None], lambda: None)
"""A single process: `reduce_mean` changes nothing, and `gather` adds a dimension of 1."""


def processes_of(accelerator: Accelerator, lockstep: bool = False) -> Processes:
    """Return the collective operations of an accelerator's processes; `lockstep` is true if they divide the model."""
    if accelerator.num_processes == 1:
        return ALONE
    return Processes(
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        reduce_mean=_reduce_mean,
        gather=_counted(lambda tensor: accelerator.gather(tensor[None])),
        wait=_counted(accelerator.wait_for_everyone),
        exchange=_counted(_exchange),
        lockstep=lockstep,
    )


def _counted(operation: Callable[P, T]) -> Callable[P, T]:
    """Return an operation that tells the other processes when this one begins it."""

    def counted(*arguments: P.args, **options: P.kwargs) -> T:
        arrive()
        return operation(*arguments, **options)

    return counted


def _exchange(value: Any) -> list[Any]:
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def _reduce_mean(tensor: Tensor) -> Tensor:
    """Without the copy that accelerate makes: for a whole model that is a second gradient."""
    arrive()
    torch.distributed.all_reduce(tensor)
    return tensor.div_(torch.distributed.get_world_size())


def from_main(value: Any, device: torch.device) -> Any:
    """Return rank 0's `value`, a plain one, on every rank; that of other ranks is ignored."""
    arrive()
    sent = [value]
    torch.distributed.broadcast_object_list(sent, src=0, device=device)
    return sent[0]


@contextlib.contextmanager
def closing_process_group() -> Iterator[None]:
    """Destroy a process group that the body created; torch would warn about it at exit."""
    joined_before = torch.distributed.is_available() and torch.distributed.is_initialized()
    try:
        yield
    finally:
        if not joined_before and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def explain_timeout(minutes: float) -> Iterator[None]:
    """Raise RunError in place of torch's error where a process has waited for the others for `minutes`.

    It names the processes that did not arrive. NCCL has no such error: its watchdog ends the process, and prints the
    collective operation. Before that, a warning names them.
    """
    with naming_missing_ranks(minutes):
        try:
            yield
        except RuntimeError as error:
            if "Timed out waiting" not in str(error) or not torch.distributed.is_initialized():
                raise
            raise RunError(_waited(minutes)) from None


def _waited(minutes: float) -> str:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    others = missing_ranks() or [other for other in range(world) if other != rank]
    named = ", ".join(map(str, others)) if len(others) <= 8 else f"{len(others)} others"
    return (
        f"process {rank} of {world} waited for {named} longer than train.process_timeout ({minutes:g} minutes): "
        "if a process was still saving, drawing or uploading, raise it; if one hangs, see its output; the same "
        "command with --resume continues from the last checkpoint"
    )
