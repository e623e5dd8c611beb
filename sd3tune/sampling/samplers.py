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
    """(the base's scheduler, a shift that replaces its own or None) -> a new scheduler."""
    order: int
    """Model evaluations per step; the last step, down to sigma 0, needs only one."""
    follows_size: bool = False
    """True if it supports a base whose shift depends on the image size."""

    def evaluations(self, steps: int) -> int:
        """Return the number of model evaluations in `steps` steps."""
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
    """DPM-Solver++(2M) (Lu et al. 2022): second order by reusing the previous step, at the cost of Euler."""
    return _FlowDpmSolver(
        num_train_timesteps=base.config.num_train_timesteps,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=base.config.shift if shift is None else shift,
    )


class _FlowDpmSolver(DPMSolverMultistepScheduler):
    """DPM-Solver++ with exact timesteps; the class of diffusers truncates 1000 sigma to an integer."""

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)


SAMPLERS = {
    "euler": Sampler(_euler, order=1, follows_size=True),
    "heun": Sampler(_heun, order=2),
    "dpmpp": Sampler(_dpmpp, order=1),
}
