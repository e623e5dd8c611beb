"""The optimizers. Each updates the flat master and keeps its state as tensors in `state[master]`.

A step with a non-finite gradient is skipped on the device: if the scalar `found_inf` is not 0, master and state keep
their values, and the host does not wait. torch's fused AdamW has this built in. Others are rules, pure functions of
tensors, between whose old and new values `RuleOptimizer` selects. Any other torch optimizer can be registered; it waits
for the device (see `HostStepped`), as those of `library_optimizers` do. Optimizers that treat each weight apart can
also update a part of the master at a time (see `Sliced`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from sd3tune.config.sections.optimizer import (
    AdamW8bitConfig,
    AdamWConfig,
    LionConfig,
    OptimizerSection,
    ProdigyConfig,
)
from sd3tune.config.variants import OPTIMIZER, Registry
from sd3tune.training import library_optimizers as library
from sd3tune.training.host_stepped import HostStepped

WITHOUT_FLOAT64 = ("mps",)
"""Types of devices that have no float64."""
BLOCK = 256
"""Number of values that share a scale in 8-bit moments, as in the optimizers of bitsandbytes."""
CHUNK = BLOCK << 16
"""Number of weights that an 8-bit step updates at a time: 64 MiB per temporary tensor, and counts that fit an int32."""

State = dict[str, Tensor]
Rule = Callable[[Tensor, Tensor, State, float], tuple[Tensor, State]]
"""(master, gradient, state, learning rate) -> (new master, changed state entries); the arguments are not modified."""


class Sliced(Protocol):
    """An optimizer that can take a step slice by slice, in any order, with the same result."""

    param_groups: list[dict[str, Any]]

    def update_slice(self, start: int, gradient: Tensor) -> None:
        """Update the weights from `start` on, a multiple of `BLOCK`, by their `gradient`, fp32; it must be finite."""

    def finish(self) -> None:
        """End the step, after the update of all slices."""


class RuleOptimizer(torch.optim.Optimizer):
    """An optimizer that applies `rule`, with `state` as the initial state.

    `spans` makes it apply the rule to `CHUNK` values at a time, for the same result with less temporary memory: it maps
    each state entry with values per weight to the weights that one value covers. Other entries are shared; their new
    values, equal in all chunks, are stored after the last.
    """

    found_inf: Tensor
    """A device scalar, set before each step: not 0 if the gradient is not finite."""
    chunk: int | None
    """The most weights that are updated at a time; None for all."""

    def __init__(
        self, master: nn.Parameter, lr: float, state: State, rule: Rule, spans: Mapping[str, int] | None = None
    ) -> None:
        super().__init__([master], {"lr": lr})
        self.state[master] = state
        self.rule, self.spans = rule, spans
        self.chunk = None if spans is None else CHUNK

        self._shared: State = {}
        """New values of the state that all weights share."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        ((master,),) = (group["params"] for group in self.param_groups)
        size, skip = self.chunk or master.numel(), self.found_inf.bool()
        for start in range(0, master.numel(), size):
            self._update(start, master.grad[start : start + size], skip)
        self.finish(skip)

    @torch.no_grad()
    def update_slice(self, start: int, gradient: Tensor) -> None:
        """See `Sliced`; without `spans`, the only slice is the whole."""
        size = self.chunk or gradient.numel()
        for first in range(0, gradient.numel(), size):
            self._update(start + first, gradient[first : first + size], None)

    @torch.no_grad()
    def finish(self, skip: Tensor | None = None) -> None:
        ((master,),) = (group["params"] for group in self.param_groups)
        _select(skip, self.state[master], self._shared)

    def _update(self, start: int, gradient: Tensor, skip: Tensor | None) -> None:
        (group,) = self.param_groups
        (master,) = group["params"]
        state, end = self.state[master], start + gradient.numel()
        slices = {
            name: entry[start // span : math.ceil(end / span)]
            for name, entry in state.items()
            if (span := (self.spans or {}).get(name))
        }
        weights = master[start:end]
        if skip is not None:
            gradient = gradient.masked_fill(skip, 0.0)  # keeps NaN out of reductions
        new_weights, new = self.rule(weights, gradient, {**state, **slices}, group["lr"])
        self._shared = {name: value for name, value in new.items() if name not in slices}
        _select(skip, {"weights": weights, **slices}, {"weights": new_weights, **new})


def _select(skip: Tensor | None, old: State, new: State) -> None:
    """Store the new values in the old tensors of the same names, unless `skip` (a device scalar or None) is true."""
    for name in old.keys() & new.keys():
        old[name].copy_(new[name] if skip is None else torch.where(skip, old[name], new[name]))


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW of one parameter, which can also update slices of it (see `Sliced`)."""

    @torch.no_grad()
    def update_slice(self, start: int, gradient: Tensor) -> None:
        (group,) = self.param_groups
        (master,) = group["params"]
        state, part = self.state[master], slice(start, start + gradient.numel())
        beta1, beta2 = group["betas"]
        adamw(
            [master[part]],
            [gradient],
            [state["exp_avg"][part]],
            [state["exp_avg_sq"][part]],
            [],
            [state["step"].clone()],  # counts this step for the slice alone
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    @torch.no_grad()
    def finish(self) -> None:
        ((master,),) = (group["params"] for group in self.param_groups)
        self.state[master]["step"].add_(1)


def make_adamw(config: AdamWConfig, master: nn.Parameter) -> torch.optim.Optimizer:
    """Return torch's fused AdamW with its state already allocated, as torch alone would do in the first step."""
    beta1, beta2 = config.betas
    optimizer = FusedAdamW(
        [master],
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    moments = {name: torch.zeros_like(master).detach() for name in ("exp_avg", "exp_avg_sq")}
    optimizer.state[master] = {"step": torch.zeros((), device=master.device), **moments}
    return optimizer


def make_adamw8bit(config: AdamW8bitConfig, master: nn.Parameter) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW8bit: its blocks, code books and kernels, but with the step number on the device.

    The class of bitsandbytes counts steps on the host, where a skipped step shows only after a wait for the device.
    """
    from bitsandbytes.functional import create_dynamic_map, dequantize_blockwise, quantize_blockwise

    beta1, beta2 = config.betas
    state = {"step": _scalar(0, master)}
    for moment, signed in (("1", True), ("2", False)):
        state |= {
            f"state{moment}": torch.zeros_like(master, dtype=torch.uint8),
            f"absmax{moment}": master.new_zeros(math.ceil(master.numel() / BLOCK)),
            f"qmap{moment}": create_dynamic_map(signed=signed).to(master.device),
        }

    def read(state: State, moment: str) -> Tensor:
        code, scale, book = (state[f"{part}{moment}"] for part in ("state", "absmax", "qmap"))
        values: Tensor = dequantize_blockwise(code, absmax=scale, code=book, blocksize=BLOCK)
        return values

    def written(values: Tensor, state: State, moment: str) -> State:
        code, quantised = quantize_blockwise(values, code=state[f"qmap{moment}"], blocksize=BLOCK)
        return {f"state{moment}": code, f"absmax{moment}": quantised.absmax}

    def rule(master: Tensor, gradient: Tensor, state: State, lr: float) -> tuple[Tensor, State]:
        step = state["step"] + 1
        exp_avg = read(state, "1").mul_(beta1).add_(gradient, alpha=1 - beta1)
        exp_avg_sq = read(state, "2").mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step).sqrt()).add_(config.eps)
        decayed = master * (1 - lr * config.weight_decay)
        new_master = decayed.addcdiv_(exp_avg * (-lr / (1 - beta1**step)), denominator)
        return new_master, {"step": step, **written(exp_avg, state, "1"), **written(exp_avg_sq, state, "2")}

    spans = {"state1": 1, "absmax1": BLOCK, "state2": 1, "absmax2": BLOCK}
    return RuleOptimizer(master, config.lr, state, rule, spans)


def make_prodigy(config: ProdigyConfig, master: nn.Parameter) -> torch.optim.Optimizer:
    """Return Prodigy in its Adam form (Mishchenko & Defazio 2024, algorithm 4), equal to the `prodigyopt` package.

    The package keeps d and its parts as Python numbers, which it reads back from the device twice per step.
    """
    beta1, beta2 = config.betas
    beta3, d0 = math.sqrt(beta2), config.d0
    state = {"step": _scalar(0, master), "d": _scalar(d0, master), "numerator": _scalar(0, master)}
    state |= {name: torch.zeros_like(master).detach() for name in ("exp_avg", "exp_avg_sq", "s")}
    state["start"] = master.detach().clone()

    def rule(master: Tensor, gradient: Tensor, state: State, lr: float) -> tuple[Tensor, State]:
        step, d = state["step"] + 1, state["d"]
        correction = (1 - beta2**step).sqrt() / (1 - beta1**step) if config.use_bias_correction else 1.0
        rate = d * lr * correction

        exp_avg = beta1 * state["exp_avg"] + (1 - beta1) * d * gradient
        exp_avg_sq = beta2 * state["exp_avg_sq"] + (1 - beta2) * d**2 * gradient**2
        progress = ((state["start"] - master) * gradient).sum(dtype=d.dtype)
        numerator = beta3 * state["numerator"] + d / d0 * rate * progress
        s = beta3 * state["s"] + d / d0 * (d if config.safeguard_warmup else rate) * gradient
        estimate = config.d_coef * numerator / s.abs().sum(dtype=d.dtype)
        d = torch.fmax(d, estimate)  # before the first gradient the estimate is 0 / 0: fmax keeps d

        new_master = master * (1 - rate * config.weight_decay) - rate * exp_avg / (exp_avg_sq.sqrt() + d * config.eps)
        new = {"step": step, "d": d, "numerator": numerator, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "s": s}
        return new_master, new

    return RuleOptimizer(master, config.lr, state, rule)


def _scalar(value: float, master: Tensor) -> Tensor:
    """Return a scalar on the master's device, as exact as a Python number where the device has float64."""
    dtype = torch.float32 if master.device.type in WITHOUT_FLOAT64 else torch.float64
    return torch.tensor(float(value), dtype=dtype, device=master.device)


def make_lion(config: LionConfig, master: nn.Parameter) -> torch.optim.Optimizer:
    """Return Lion (Chen et al. 2023, algorithm 2), equal to bitsandbytes' 32-bit Lion, but without waiting."""
    beta1, beta2 = config.betas

    def rule(master: Tensor, gradient: Tensor, state: State, lr: float) -> tuple[Tensor, State]:
        direction = (beta1 * state["exp_avg"] + (1 - beta1) * gradient).sign()
        exp_avg = beta2 * state["exp_avg"] + (1 - beta2) * gradient
        return master * (1 - lr * config.weight_decay) - lr * direction, {"exp_avg": exp_avg}

    return RuleOptimizer(master, config.lr, {"exp_avg": torch.zeros_like(master).detach()}, rule, {"exp_avg": 1})


@dataclass(frozen=True)
class OptimizerKind:
    """An optimizer that a configuration can name."""

    make: Callable[[Any, Any], Any]
    """(settings, the flat fp32 master) -> an optimizer of that one parameter. With `matrix_values`, (settings, views of
    the master by name) -> optimizers that update all of them."""
    skips_on_device: bool = True
    """True if it skips non-finite gradients by `found_inf`, without waiting for the device, and allocates all of its
    state at the start, as tensors. Any other optimizer is wrapped in `HostStepped`."""
    matrix_values: Callable[[torch.Size], int] | None = None
    """For an optimizer that treats each matrix as a whole: the number of fp32 values in its state for one shape."""
    averaged: Callable[[Any, Tensor, Mapping[str, Tensor]], Tensor] | None = None
    """(settings, master, state's tensors) -> the weights to export, if the master holds others."""
    package: str | None = None
    """Optional package that it needs; the extra to install has the same name."""
    torch_class: tuple[str, str] | None = None
    """Class of `torch.optim` that it needs, and the first torch version that has it, if that is not the oldest one."""
    fallback: type[OptimizerSection] | None = None
    """Replacement, with the same settings, on a device that does not support it."""


OPTIMIZERS: Registry[OptimizerKind] = Registry(
    OPTIMIZER,
    {
        "adamw": OptimizerKind(make_adamw),
        "adamw8bit": OptimizerKind(make_adamw8bit, package="bitsandbytes", fallback=AdamWConfig),
        "prodigy": OptimizerKind(make_prodigy),
        "lion": OptimizerKind(make_lion),
        "muon": OptimizerKind(library.make_muon, False, matrix_values=library.muon_values, torch_class=("Muon", "2.9")),
        "adafactor": OptimizerKind(library.make_adafactor, False, matrix_values=library.adafactor_values),
        "schedulefree": OptimizerKind(
            library.make_schedule_free, False, averaged=library.averaged, package="schedulefree"
        ),
        "paged_adamw8bit": OptimizerKind(library.make_paged_adamw8bit, False, package="bitsandbytes"),
    },
)


def make_optimizer(
    settings: OptimizerSection, master: nn.Parameter, views: Mapping[str, Tensor] | None = None
) -> torch.optim.Optimizer:
    """Return the configured optimizer of the flat fp32 master; `views` are its matrices by name (default: one)."""
    kind = OPTIMIZERS[settings.kind]
    if kind.matrix_values is not None:
        matrices = {name: nn.Parameter(view) for name, view in (views or {"master": master.detach()}).items()}
        return HostStepped(*kind.make(settings, matrices), master=master, parts=matrices)
    optimizer: torch.optim.Optimizer = kind.make(settings, master)
    if kind.skips_on_device:
        return optimizer
    return HostStepped(optimizer, average=functools.partial(kind.averaged, settings) if kind.averaged else None)


def state_tensors(optimizer: torch.optim.Optimizer, master: nn.Parameter) -> dict[str, Tensor]:
    """Return the tensors of the optimizer's state by name; not copies."""
    if isinstance(optimizer, HostStepped):
        return optimizer.tensors()
    return {name: value for name, value in optimizer.state[master].items() if isinstance(value, Tensor)}


def result_of(optimizer: torch.optim.Optimizer, master: nn.Parameter) -> Tensor:
    """Return the weights to export, in the master's shape: the master or, for some optimizers, an average."""
    return optimizer.result() if isinstance(optimizer, HostStepped) else master.detach()


def register_optimizer(
    section: type[OptimizerSection],
    make: Callable[[Any, nn.Parameter], torch.optim.Optimizer],
    *,
    skips_on_device: bool = False,
) -> None:
    """Add an optimizer: `make(settings, master)` returns any `torch.optim.Optimizer` of the one flat fp32 master.

    By default each step waits for the device; set `skips_on_device` if the optimizer meets the conditions of
    `OptimizerKind.skips_on_device`. Its `step` gets no closure. Its state may hold tensors, numbers and texts.
    Raises ValueError for a kind that is already registered.
    """
    OPTIMIZERS.register(section, OptimizerKind(make, skips_on_device))
