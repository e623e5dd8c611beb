"""Transformer blocks that the processes of a run divide among themselves, with torch's FSDP2, imported on use.

Each process keeps its rows of every parameter of a block. The rows are gathered before the block computes, forward and
backward, and freed after it. Gradients of trained rows are averaged over the processes in fp32, and stay divided.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def mesh_of(device: torch.device) -> DeviceMesh:
    """Return all processes of the run as a mesh of one dimension; they must have joined a process group."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def rows_of(rows: int, mesh: DeviceMesh) -> slice:
    """Return this process's part of a parameter with that many rows: equal parts, of which the last may be smaller."""
    each = -(-rows // mesh.size())
    start = min(mesh.get_local_rank() * each, rows)
    return slice(start, min(start + each, rows))


def shard_blocks(
    transformer: SD3Transformer2DModel, mesh: DeviceMesh, device: torch.device, whole: Collection[nn.Parameter]
) -> None:
    """Divide the parameters of a model on the CPU, block by block; the rest of the model moves to `device`.

    The parameters `whole`, such as an adapter's, are not divided, nor are frozen parameters outside of the blocks:
    they are few, and are used outside of the model's forward pass. The device never holds more than the result and one
    block. The order of the model's parameters, their names and global shapes stay.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    inside = {of for block in transformer.transformer_blocks for of in block.parameters()}
    outside = {of for of in transformer.parameters() if of not in inside and not of.requires_grad}
    ignored = {*whole, *outside}
    for part in (*transformer.transformer_blocks, transformer):
        fully_shard(
            part,
            mesh=mesh,
            reshard_after_forward=True,  # also the root's: weights may change after a pass without gradients
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
            ignored_params=ignored,
        )
    for parameter in ignored:
        parameter.data = parameter.data.to(device)


def is_divided(tensor: Tensor) -> bool:
    """Return True for a parameter whose rows the processes have divided: a DTensor."""
    return hasattr(tensor, "device_mesh")


def gathered(tensor: Tensor) -> Tensor:
    """Return a divided parameter as a whole, which takes all processes; any other tensor as it is."""
    divided: Any = tensor
    whole: Tensor = divided.full_tensor() if is_divided(tensor) else tensor
    return whole


def overwrite_rows(parameter: Tensor, value: Tensor) -> Callable[[], object]:
    """Write this process's rows of a whole `value` into a divided parameter. Return the function that restores it.

    The replaced rows wait in system memory.
    """
    divided: Any = parameter.detach()
    own: Tensor = divided.to_local()
    live = own.to("cpu", copy=True)
    own.copy_(value[rows_of(len(value), divided.device_mesh)])
    return lambda: own.copy_(live)
