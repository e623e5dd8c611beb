"""Memory of training when the processes divide the transformer's blocks: an account of what each process holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.forecast.rehearsal import Training

GATHERED = 2
"""Copies of the largest block at a time: the gathered block, and the buffer in which one arrives."""


def divided(training: Training, transformer: SD3Transformer2DModel, trained: Collection[str], world: int) -> Training:
    """Return the memory of the process with the most rows, from the memory of a process that divides nothing.

    `transformer` has the frozen model's shapes and dtype, without hoisted layers; `trained` names those of its
    parameters that are trained themselves, none for an adapter. Each process has the rows of 1 / `world` of the blocks
    and of the trained parameters, rounded up for each parameter, and gathers one block at a time. Master, gradient sum,
    optimizer state and average of trained parameters are as large as the rows in fp32; the model has a copy of the rows
    in its dtype. A block's whole gradient exists until it is reduced in fp32.
    """
    named = dict(transformer.named_parameters())
    in_blocks = {name: of for name, of in named.items() if name.startswith("transformer_blocks.")}
    frozen = [of for name, of in in_blocks.items() if name not in trained]
    itemsize = transformer.dtype.itemsize
    largest = max(sum(of.nbytes for of in block.parameters()) for block in transformer.transformer_blocks)
    account = replace(
        training,
        frozen=training.frozen - sum(of.nbytes for of in frozen) + itemsize * _rows(frozen, world),
        gathered=GATHERED * largest,
    )
    if not trained:
        return account
    whole = sum(named[name].numel() for name in trained)
    own = _rows((named[name] for name in trained), world)

    def share(nbytes: int) -> int:
        return nbytes * own // whole

    gradients = min(2 * itemsize * whole, training.working - training.saved)  # and a copy of them, when they are added
    of_block = largest // itemsize * (itemsize + torch.float32.itemsize)
    return replace(
        account,
        compute=itemsize * own,
        master=share(training.master),
        gradient=share(training.gradient),
        optimizer=share(training.optimizer),
        average=share(training.average),
        working=training.working - gradients + share(gradients) + of_block,
    )


def _rows(parameters: Iterable[Tensor], world: int) -> int:
    """Return the number of values of the process with the most rows."""
    return sum(-(-len(of) // world) * of[0].numel() for of in parameters)
