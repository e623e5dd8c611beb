"""Measurements of a device: time, peak memory and kernels, with counterparts on the CPU to run the same code."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from sd3tune.forecast.footprint import Footprint


class Device(Protocol):
    torch: torch.device
    name: str

    def seconds(self) -> float:
        """Return the time after all submitted work of the device is done."""

    def watching_memory(self) -> AbstractContextManager[Any]:
        """Return a context in which tensors are tracked."""

    def restart_peak(self) -> None:
        """Reset the peak to the memory in use now."""

    def peak_bytes(self) -> int:
        """Return the peak bytes of tensors created in the context."""

    def kernels(self, compute: Callable[[], object]) -> int | None:
        """Return the number of kernels of one call; None if they cannot be counted."""

    def clear(self) -> None:
        """Free unused memory."""


class Cuda:
    def __init__(self) -> None:
        self.torch = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.torch)

    def seconds(self) -> float:
        torch.cuda.synchronize(self.torch)
        return time.perf_counter()

    def watching_memory(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def restart_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.torch)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self.torch)

    def kernels(self, compute: Callable[[], object]) -> int | None:
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                compute()
                torch.cuda.synchronize(self.torch)
        except RuntimeError:  # such as missing access to the performance counters
            return None
        on_device = [event for event in seen.events() or () if event.device_type == DeviceType.CUDA]
        return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device) or None

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


def outcome_of(error: Exception) -> str:
    """Return in a few words why something was not measured."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Cpu:
    """Peak memory is counted by `Footprint`, and kernels are ATen's operations."""

    def __init__(self) -> None:
        self.torch, self.name = torch.device("cpu"), "CPU"
        self._footprint = Footprint()

    def seconds(self) -> float:
        return time.perf_counter()

    def watching_memory(self) -> AbstractContextManager[Footprint]:
        self._footprint = Footprint()
        return self._footprint

    def restart_peak(self) -> None:
        self._footprint.peak = self._footprint.now

    def peak_bytes(self) -> int:
        return self._footprint.peak

    def kernels(self, compute: Callable[[], object]) -> int | None:
        with _Counting() as counting:
            compute()
        return counting.operations

    def clear(self) -> None:
        gc.collect()
