"""A process of several sharded runs, one after the other.

`main(FOLDER, [NAME[:STOP], ...])` trains FOLDER/NAME.yaml for each name. With a number of steps as STOP,
the run is stopped after that step, and resumed; with `STOP` `resume`, it is only resumed. The gradient of a run's first
step goes into FOLDER/NAME-gradient.safetensors.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

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


class Counter:
    """A callback that counts the bytes of the model which this process holds: FOLDER/NAME-RANK.json.

    `frozen` and `trained` are bytes between passes; `gathered` is the most that blocks hold beyond that in a pass.
    """

    def __init__(self, file: Path) -> None:
        self.file, self.gathered = file, 0

    def __call__(self, view: View) -> None:
        if self.gathered == 0:
            for block in view.transformer.transformer_blocks:
                block.attn.register_forward_pre_hook(lambda *_: self._count_gathered(view))
        if view.last:
            held = {"frozen": 0, "trained": 0}
            for tensor in (*view.transformer.parameters(), *view.transformer.buffers()):
                own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                held["trained" if tensor.requires_grad else "frozen"] += own.nbytes
            self.file.write_text(json.dumps({**held, "gathered": self.gathered}))

    def _count_gathered(self, view: View) -> None:
        blocks = [of for of in view.transformer.transformer_blocks.parameters() if not isinstance(of, DTensor)]
        adapters = [of for name, of in view.transformer.named_parameters() if "lora" in name]
        self.gathered = max(self.gathered, sum(of.nbytes for of in blocks) - sum(of.nbytes for of in adapters))


def main(folder: Path, runs: list[str]) -> None:
    train.closing_process_group = contextlib.nullcontext  # type: ignore[assignment]  # one group serves all runs
    for run in runs:
        name, _, stop = run.partition(":")
        config = load_config(folder / f"{name}.yaml").config

        def stopped(view: View, stop: str = stop) -> None:
            if stop.isdecimal() and view.step == int(stop):
                raise InterruptedError

        counter = Counter(folder / f"{name}-{os.environ['RANK']}.json")
        with first_gradient(folder / f"{name}-gradient.safetensors"):
            with contextlib.suppress(InterruptedError):
                train.run_training(config, resume=stop == "resume", callbacks=[stopped, counter])
            if stop.isdecimal():
                train.run_training(config, resume=True, callbacks=[Counter(counter.file)])
    torch.distributed.destroy_process_group()


def rank(number: int, environment: dict[str, str], folder: Path, runs: list[str]) -> None:
    """Be process `number` of a launch with this environment alone, as the fork server's is that of its first use."""
    os.environ.clear()
    os.environ.update(environment | {"RANK": str(number), "LOCAL_RANK": str(number)})
    os.chdir(folder)
    main(folder, runs)
