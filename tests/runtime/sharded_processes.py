"""Started by torch.distributed.run: several sharded runs in one launch, as most of a launch goes into imports.

`sharded_processes.py FOLDER NAME[:STOP] ...`: trains FOLDER/NAME.yaml for each name. With a number of steps as STOP,
the run is stopped after that step, and resumed; with `STOP` `resume`, it is only resumed. The gradient of a run's first
step goes into FOLDER/NAME-gradient.safetensors, and the bytes of rank R's part into FOLDER/NAME-RANK.json.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3tune.commands import train
from sd3tune.config import load_config
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.loop import View
from sd3tune.training.sharded_master import ShardedMaster


@contextlib.contextmanager
def first_gradient(file: Path) -> Iterator[None]:
    """Write the averaged gradient of the first step that is taken in the context."""
    genuine = {kind: kind.averaged for kind in (FlatMaster, ShardedMaster)}
    done = file.exists()

    def noted(self: FlatMaster, reduce_mean: object) -> Tensor:
        nonlocal done
        gradient = genuine[type(self)](self, reduce_mean)  # type: ignore[arg-type]
        if not done:
            done = True
            whole = {name: tensor.clone() for name, tensor in self.named(gradient).items()}
            if os.environ.get("RANK", "0") == "0":
                save_file(whole, file)
        return gradient

    for kind in genuine:
        kind.averaged = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, method in genuine.items():
            kind.averaged = method  # type: ignore[method-assign]


def count(file: Path, view: View) -> None:
    """Write the bytes of the model's parameters that this process holds, by block, and outside of the blocks."""
    held: dict[str, int] = {}
    for name, parameter in view.transformer.named_parameters():
        part = name.split(".")[1] if name.startswith("transformer_blocks.") else "outside"
        own = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        held[part] = held.get(part, 0) + own.nbytes
    file.write_text(json.dumps(held))


def main(folder: Path, runs: list[str]) -> None:
    train.closing_process_group = contextlib.nullcontext  # type: ignore[assignment]  # one group serves all runs
    for run in runs:
        name, _, stop = run.partition(":")
        config = load_config(folder / f"{name}.yaml").config

        def stopped(view: View, stop: str = stop) -> None:
            if stop.isdecimal() and view.step == int(stop):
                raise InterruptedError

        def counted(view: View, name: str = name) -> None:
            if view.last:
                count(folder / f"{name}-{os.environ['RANK']}.json", view)

        with first_gradient(folder / f"{name}-gradient.safetensors"):
            with contextlib.suppress(InterruptedError):
                train.run_training(config, resume=stop == "resume", callbacks=[stopped, counted])
            if stop.isdecimal():
                train.run_training(config, resume=True, callbacks=[counted])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
