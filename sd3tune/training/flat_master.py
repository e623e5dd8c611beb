"""One flat fp32 master: clipping, optimizer, all-reduce, EMA and cast each act on a single tensor.

The model's parameters are views of one flat buffer in the base's dtype. So the forward pass casts nothing: neither the
small matrices nor, as in PEFT, the activations to fp32. Updates go to the fp32 master, so none is lost to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sd3tune.config.sections.train import EmaConfig

GROWTH_INTERVAL = 2000
"""Good steps after which the loss scale is doubled."""
MIN_LOSS_SCALE = 1.0
"""A lower scale would cause the underflow that scaling prevents; at 1, overflow comes from the model itself."""
NORM_CHUNK = 1 << 16
"""Elements per partial norm on the CPU, where a plain fp32 sum of ten million squares loses four digits."""


class FlatMaster:
    """The fp32 master copy of the trainable parameters, and their accumulated gradient.

    `parameters` are fp32 tensors inside the model; they become views of `compute`, a copy of the master in `dtype`.
    With fp32, `compute` is the master itself, without a copy. Without `accumulates` there is no gradient: see
    `fused_backward`. `rates` has the learning rates of parameters, as multiples, that differ from 1. `segments` are
    prefixes of names (see `Method.segments`).
    """

    is_sharded = False
    """True if this process has only a part of each parameter."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        dtype: torch.dtype,
        accumulates: bool = True,
        rates: Mapping[str, float] = {},
        segments: Sequence[str] = (),
    ) -> None:
        self.shapes = {name: parameter.shape for name, parameter in parameters.items()}
        self.parameters = list(parameters.values())
        self.master = nn.Parameter(torch.cat([p.detach().float().reshape(-1) for p in self.parameters]))
        for parameter in self.parameters:  # frees a whole model's values before there is another copy
            parameter.data = parameter.data.new_empty(0)
        self.compute = self.master.detach().to(dtype)
        self.gradient = torch.zeros_like(self.master) if accumulates else self.master.new_empty(0)
        for parameter, view in zip(self.parameters, self.views(self.compute).values(), strict=True):
            parameter.data = view
        self.rates = torch.ones_like(self.master.detach()) if rates else None
        for name, view in (self.views(self.rates) if self.rates is not None else {}).items():
            view.fill_(rates.get(name, 1.0))
        self._frozen: tuple[str, ...] = ()
        self.clipped_parts = self._parts(segments)
        """The parts of the master whose gradients are clipped by themselves."""

    @property
    def whole_shapes(self) -> Mapping[str, torch.Size]:
        """Shape of each parameter, in the master's order."""
        return self.shapes

    @property
    def sizes(self) -> list[int]:
        """Number of elements of each parameter, in the master's order."""
        return [shape.numel() for shape in self.shapes.values()]

    def _parts(self, segments: Sequence[str]) -> list[slice]:
        """Return the values before the first segment, and those of each segment."""
        firsts = [next((n for n, name in enumerate(self.shapes) if name.startswith(one)), None) for one in segments]
        starts = [0, *(sum(self.sizes[:first]) for first in firsts if first is not None)]
        return [slice(*ends) for ends in zip(starts, [*starts[1:], self.master.numel()], strict=True)]

    def collect_gradients(self) -> None:
        """Add the parameters' gradients to the fp32 sum, and clear them."""
        if any(parameter.grad is None for parameter in self.parameters):
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        self.gradient += torch.cat([p.grad.reshape(-1) for p in self.parameters])  # type: ignore[union-attr]
        for parameter in self.parameters:
            parameter.grad = None

    def averaged(self, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the gradient sum, averaged over the processes, in place; see `train_step` for `reduce_mean`."""
        return reduce_mean(self.gradient)

    def norm(self, gradient: Tensor) -> Tensor:
        """Return the norm of a part of the averaged gradient."""
        return norm_of(gradient)

    @contextmanager
    def at_own_rates(self) -> Iterator[None]:
        """Multiply the update that is made in the context by the parameters' learning rates.

        An optimizer whose update is proportional to its rate then updates each parameter at its own.
        """
        if self.rates is None:
            yield
            return
        before = self.master.detach().clone()
        yield
        with torch.no_grad():
            self.master.copy_(torch.addcmul(before, self.rates, self.master - before))

    def freeze(self, prefixes: Sequence[str]) -> None:
        """Stop training the parameters whose names begin with one of the prefixes; their values stay as they are.

        The forward pass then computes no gradients for them.
        """
        if tuple(prefixes) == self._frozen:
            return
        self._frozen = tuple(prefixes)
        if self.rates is None:
            self.rates = torch.ones_like(self.master.detach())
        for parameter, (name, rate) in zip(self.parameters, self.views(self.rates).items(), strict=True):
            if name.startswith(self._frozen):
                parameter.requires_grad_(False)
                rate.zero_()

    def publish(self, part: slice = slice(None)) -> None:
        """Copy a part of the master to the model's parameters.

        Raises RuntimeError if they no longer share the flat buffer.
        """
        if self.parameters[0].data_ptr() != self.compute.data_ptr():
            raise RuntimeError("the model's parameters were moved or cast: they no longer follow the master")
        if self.compute.data_ptr() != self.master.data_ptr():
            self.compute[part].copy_(self.master.detach()[part])

    def named(self, flat: Tensor) -> Mapping[str, Tensor]:
        """Return the named tensors of `flat`, which is laid out like the master; they are views of it."""
        return self.views(flat)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of this process's values of each parameter in `flat`, which is laid out like the master."""
        views = flat.detach().split(self.sizes)
        return {name: view.view(shape) for view, (name, shape) in zip(views, self.shapes.items(), strict=True)}

    def divided(self, flat: Tensor) -> Mapping[str, Tensor]:
        """Return `views`, as torch's DTensors where the processes divide the parameters."""
        return self.views(flat)

    def own_part(self, flat: Tensor) -> Tensor:
        """Return this process's part of a tensor that is laid out like an undivided master: all of it."""
        return flat


class LossScale:
    """Dynamic loss scaling for fp16, without a host sync (Micikevicius et al. 2018): halve on overflow, double later.

    The rule is that of torch's GradScaler, with a floor: NaN, which no scale prevents, must not shrink the scale to 0.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.scale = torch.full((), 2.0**16 if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), device=device)
        self.enabled = enabled

    def update(self, overflow: Tensor) -> None:
        """Adjust the scale after a step; `overflow` is a boolean scalar on the device."""
        if not self.enabled:
            return
        self.good_steps.copy_(torch.where(overflow, 0.0, self.good_steps + 1))
        grow = self.good_steps >= GROWTH_INTERVAL
        self.scale.mul_(torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))).clamp_(min=MIN_LOSS_SCALE)
        self.good_steps.masked_fill_(grow, 0)


def clip_(gradient: Tensor, max_norm: float | None, measure: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Scale `gradient` in place to a norm of at most `max_norm`. Return the norm before, a device scalar.

    `measure` returns the norm, `norm_of` by default.
    """
    norm = (measure or norm_of)(gradient)
    if max_norm is not None:
        gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def norm_of(gradient: Tensor) -> Tensor:
    """Return the norm in fp32. On a GPU one kernel sums it in parts anyway, and chunks would keep the host busy."""
    if gradient.is_cpu:
        return nn.utils.get_total_norm(gradient.split(NORM_CHUNK))
    return torch.linalg.vector_norm(gradient)


def ema_decay(config: EmaConfig, step: int) -> float:
    """Return the EMA decay of `step` (1-based), warmed up so that the initial weights lose influence quickly."""
    return min(config.decay, (1 + step) / (10 + step))
