"""The master of a model whose trained parameters are divided among processes: each process has its rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from sd3tune.model.compute.sharding import rows_of
from sd3tune.training.flat_master import FlatMaster, norm_of


class ShardedMaster(FlatMaster):
    """A flat master of this process's rows of each parameter; `attach` it to the divided model.

    Optimizer state and EMA are laid out like it, so an optimizer must update each weight apart. `parameters` are whole
    fp32 tensors, equal in all processes. The model keeps its own copy of the rows, in its compute dtype.
    """

    is_sharded = True

    def __init__(self, parameters: Mapping[str, nn.Parameter], mesh: DeviceMesh, device: torch.device) -> None:
        own = {
            name: nn.Parameter(whole.detach()[rows_of(len(whole), mesh)].to(device, torch.float32))
            for name, whole in parameters.items()
        }
        super().__init__(own, torch.float32)
        self.mesh = mesh
        self._whole = {name: whole.shape for name, whole in parameters.items()}
        self._rows: list[DTensor] = []
        """The model's parameters, in the master's order."""

    @property
    def whole_shapes(self) -> Mapping[str, torch.Size]:
        return self._whole

    def attach(self, model: nn.Module) -> None:
        """Follow the parameters of the divided model, whose values the master had."""
        parameters = dict(model.named_parameters())
        for name in self.shapes:
            rows = parameters[name]
            assert isinstance(rows, DTensor)
            self._rows.append(rows)

    def collect_gradients(self) -> None:
        """Add the gradients of this process's rows, averaged over the processes, to the fp32 sum, and clear them."""
        found = []
        for rows in self._rows:
            gradient = torch.zeros_like(rows) if rows.grad is None else rows.grad
            assert isinstance(gradient, DTensor)
            found.append(gradient.to_local().reshape(-1))
            rows.grad = None
        self.gradient += torch.cat(found)

    def averaged(self, reduce_mean: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the gradient sum: the processes have averaged it already."""
        return self.gradient

    def norm(self, gradient: Tensor) -> Tensor:
        """Return the norm of a gradient over all processes, of which `gradient` has this one's part."""
        squared = norm_of(gradient).square()
        torch.distributed.all_reduce(squared, group=self.mesh.get_group())
        return squared.sqrt()

    @torch.no_grad()
    def publish(self, part: slice = slice(None)) -> None:
        """Copy the master to the model's rows."""
        own = [rows.to_local() for rows in self._rows]
        torch._foreach_copy_(own, list(self.views(self.master).values()))

    def named(self, flat: Tensor) -> Mapping[str, Tensor]:
        """Return the whole named tensors of `flat`. Reading one gathers it, so all processes must read the same."""
        return _Gathered(self.divided(flat))

    def divided(self, flat: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, own in self.views(flat).items():
            shape = self._whole[name]
            stride = torch.empty(shape, device="meta").stride()
            found[name] = DTensor.from_local(own, self.mesh, (Shard(0),), run_check=False, shape=shape, stride=stride)
        return found

    def own_part(self, flat: Tensor) -> Tensor:
        """Return this process's part of a tensor that is laid out like an undivided master."""
        whole = flat.split([shape.numel() for shape in self._whole.values()])
        pairs = zip(whole, self._whole.values(), strict=True)
        return torch.cat([part.view(shape)[rows_of(shape[0], self.mesh)].reshape(-1) for part, shape in pairs])


class _Gathered(Mapping[str, Tensor]):
    """Whole tensors by name, each gathered when it is read."""

    def __init__(self, divided: Mapping[str, Tensor]) -> None:
        self._divided = divided

    def __getitem__(self, name: str) -> Tensor:
        divided = self._divided[name]
        assert isinstance(divided, DTensor)
        return divided.full_tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._divided)

    def __len__(self) -> int:
        return len(self._divided)

    def __contains__(self, name: object) -> bool:  # without reading it
        return name in self._divided
