"""Optimizers of other libraries, which know neither `found_inf` nor checkpoints of this package."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.errors import RunError


class HostStepped(torch.optim.Optimizer):
    """Wrapper for any torch optimizer, even without `found_inf` and with state created in later steps.

    Each step therefore waits for the device to learn if the gradient is finite. A resumed run takes the state from the
    checkpoint as it is: tensors, numbers and texts.

    `parts` are views of the flat `master` by name, for optimizers that treat each matrix as a whole; together, `inner`
    and `others` update them all. Without, `inner` updates the master itself.
    """

    found_inf: Tensor
    """See `RuleOptimizer.found_inf`."""

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        *others: torch.optim.Optimizer,
        master: nn.Parameter | None = None,
        parts: Mapping[str, nn.Parameter] | None = None,
        average: Callable[[Tensor, Mapping[str, Tensor]], Tensor] | None = None,
    ) -> None:
        self.inner, self.inners = inner, (inner, *others)
        self.group = inner.param_groups[0]
        if master is None or parts is None:
            (master,) = self.group["params"]
            parts = {"": master}
            super().__init__(inner.param_groups, inner.defaults)
            self.state = inner.state
        else:
            super().__init__([master], {"lr": self.group["lr"]})
        self.master, self.parts = master, dict(parts)
        self.configured = dict(self.group)
        self._average = average

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        if self.found_inf.item():
            return
        for part, gradient in zip(self.parts.values(), self._gradients(), strict=True):
            part.grad = gradient
        for inner in self.inners:
            for group in inner.param_groups:
                group["lr"] = self.param_groups[0]["lr"]
            inner.step()
        for part in self.parts.values():
            part.grad = None

    def _gradients(self) -> list[Tensor]:
        """Return the gradient of each part, in its shape: views of the master's gradient."""
        assert self.master.grad is not None
        if "" in self.parts:
            return [self.master.grad]
        flat = self.master.grad.split([part.numel() for part in self.parts.values()])
        return [gradient.view(part.shape) for gradient, part in zip(flat, self.parts.values(), strict=True)]

    def result(self) -> Tensor:
        """Return the weights to export, in the master's shape: the master, or `average(master, tensors())`."""
        master = self.master.detach()
        return master if self._average is None else self._average(master, self.tensors())

    def knows(self, name: str) -> bool:
        """Return whether `name` can name a value of the state: see `tensors`."""
        return name.rpartition(".")[0] in self.parts

    def tensors(self) -> dict[str, Tensor]:
        """Return the state's tensors by name: `exp_avg` or, with parts, `NAME.exp_avg`; not copies."""
        return {name: value for name, value in self._entries().items() if isinstance(value, Tensor)}

    def numbers(self) -> dict[str, Any]:
        """Return the optimizer's state without tensors, for JSON. Raises RunError for a value that JSON cannot hold."""
        tensors = self.tensors()
        plain = {name: value for name, value in self._entries().items() if name not in tensors}
        changed = {
            name: value
            for name, value in self.group.items()
            if name != "params"
            and value is not self.configured.get(name)  # unchanged values follow from the configuration
        }
        odd = next((name for name, value in {**plain, **changed}.items() if not _fits_json(value)), None)
        if odd is not None:
            raise RunError(
                f"optimizer: {type(self.inner).__name__} remembers {odd!r}, and a checkpoint holds tensors, texts and "
                "finite numbers only; choose another optimizer"
            )
        on_the_host = [name for name, value in tensors.items() if value.device.type == "cpu"]
        return {"state": plain, "group": changed, "on_the_host": on_the_host}

    def remember(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore the state from the result of `numbers` and the tensors, which are copied to their devices.

        State that exists already keeps its memory, which may be of a special kind.
        """
        existing = self._entries()
        for part in self.parts.values():
            self._state_of(part).clear()
        for name, value in {**tensors, **numbers["state"]}.items():
            part, _, entry = name.rpartition(".")
            old = existing.get(name)
            if isinstance(value, Tensor):
                if isinstance(old, Tensor) and (old.shape, old.dtype) == (value.shape, value.dtype):
                    value = old.copy_(value)
                else:
                    on_the_host = name in numbers["on_the_host"]
                    value = value.clone() if on_the_host else value.to(self.master.device, copy=True)
            self._state_of(self.parts[part])[entry] = value
        self.group.update(numbers["group"])

    def _state_of(self, part: nn.Parameter) -> dict[str, Any]:
        for inner in self.inners:
            if any(part is other for group in inner.param_groups for other in group["params"]):
                state: dict[str, Any] = inner.state[part]
                return state
        raise LookupError("no optimizer updates this part")

    def _entries(self) -> dict[str, Any]:
        return {
            f"{name}.{entry}" if name else entry: value
            for name, part in self.parts.items()
            for entry, value in self._state_of(part).items()
        }


def _fits_json(value: object) -> bool:
    return value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value))
