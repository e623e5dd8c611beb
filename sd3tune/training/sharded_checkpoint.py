"""Checkpoints whose tensors several processes write and read together, with torch's distributed checkpoints.

Each process writes one safetensors file with its rows of every tensor, and their places in the whole. Any number of
processes can read them, as rows are cut anew. Nothing is pickled. torch's part is imported on use.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from sd3tune.files.regular import sha256_of
from sd3tune.training.flat_master import FlatMaster

PATTERN = "shard-*.safetensors"


class DamagedShards(Exception):
    """Tensors of a distributed checkpoint that cannot be read, with the reason."""


def by_parameter(master: FlatMaster, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors, each laid out like the master, as one per parameter, `KIND.PARAMETER`; not copies."""
    found: dict[str, Tensor] = {}
    for kind, tensor in tensors.items():
        if tensor.shape == master.master.shape:
            found |= {f"{kind}.{name}": part for name, part in master.divided(tensor).items()}
        else:
            found[kind] = tensor
    return found


def write_shards(folder: Path, master: FlatMaster, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Write the tensors of all processes into a folder that all see. Return this process's files, with digests."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(path=str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about arguments that it passes to itself
        save(by_parameter(master, tensors), storage_writer=writer)
    return {file.name: sha256_of(file) for file in _own(folder, sorted(file.name for file in folder.glob(PATTERN)))}


def read_shards(folder: Path, master: FlatMaster, tensors: Mapping[str, Tensor], digests: Mapping[str, Any]) -> None:
    """Read the tensors in place, from files that any number of processes wrote. Raises DamagedShards."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        for file in _own(folder, sorted(digests)):
            if sha256_of(file) != digests[file.name]:
                raise DamagedShards(f"{file.name}: not the bytes that were written")
        reader = HuggingFaceStorageReader(path=str(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            parts = by_parameter(master, tensors)
            load(parts, storage_reader=reader, no_dist=not master.is_sharded)
    except (OSError, RuntimeError, ValueError, KeyError, AssertionError, SafetensorError, CheckpointException) as error:
        raise DamagedShards(" ".join(str(error).split())[:200]) from error


def _own(folder: Path, names: list[str]) -> list[Path]:
    """Return the files that this process reads to check them: those of all processes are each read once."""
    is_joined = torch.distributed.is_initialized()
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_joined else (0, 1)
    return [folder / name for name in names[rank::world]]
