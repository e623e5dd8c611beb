"""Solvers of the flow dx/dsigma = v(x, sigma) from noise at sigma 1 to an image at sigma 0.

Each is a scheduler of diffusers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
)


@dataclass(frozen=True)
class Sampler:
    """A solver: its scheduler, and the cost of a step."""

    scheduler: Callable[[FlowMatchEulerDiscreteScheduler, float | None], Any]
    """(the base's scheduler, a shift instead of its own) -> a new scheduler."""
    order: int
    """Evaluations of the model in a step; the last step, down to sigma 0, needs one."""
    follows_size: bool = False
    """Whether it supports a base whose shift depends on the size of the image."""

    def evaluations(self, steps: int) -> int:
        return self.order * (steps - 1) + 1


def _euler(base: FlowMatchEulerDiscreteScheduler, shift: float | None) -> FlowMatchEulerDiscreteScheduler:
    """The solver of `StableDiffusion3Pipeline`."""
    if shift is None:
        return copy.deepcopy(base)
    return FlowMatchEulerDiscreteScheduler.from_config(base.config, shift=shift, use_dynamic_shifting=False)


def _heun(base: FlowMatchEulerDiscreteScheduler, shift: float | None) -> FlowMatchHeunDiscreteScheduler:
    """Heun's method: each step takes the mean of the velocities at its two ends, on Euler's noise levels."""
    shift = base.config.shift if shift is None else shift
    return FlowMatchHeunDiscreteScheduler(base.config.num_train_timesteps, shift)


def _dpmpp(base: FlowMatchEulerDiscreteScheduler, shift: float | None) -> DPMSolverMultistepScheduler:
    """DPM-Solver++(2M) of Lu et al. 2022: second order from the step before, at the cost of Euler."""
    return _FlowDpmSolver(
        num_train_timesteps=base.config.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=base.config.shift if shift is None else shift,
    )


class _FlowDpmSolver(DPMSolverMultistepScheduler):
    """Pass exact timesteps to the model; diffusers' own class truncates 1000 sigma to a whole number."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)


SAMPLERS = {
    "euler": Sampler(_euler, order=1, follows_size=True),
    "heun": Sampler(_heun, order=2),
    "dpmpp": Sampler(_dpmpp, order=1),
}
