"""Started by torch.distributed.run: several runs in one launch, as most of a launch goes into imports.

`two_processes.py FOLDER`: trains FOLDER/straight.yaml; trains FOLDER/stopped.yaml, stops it after step 3, resumes it,
has the second rank alone receive a SIGTERM after step 4, and resumes it again. Each rank notes in
FOLDER/exports-RANK.txt what adapters it wrote. Last it trains FOLDER/prodigy.yaml, FOLDER/scratch.yaml, and
FOLDER/broken.yaml while bitsandbytes fails in rank 1; each rank writes its last weights to NAME-RANK.safetensors.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sd3tune.commands import train
from sd3tune.config import Config, load_config
from sd3tune.errors import RunError
from sd3tune.methods import LoraMethod
from sd3tune.training.loop import View

OPTIMIZERS_OF_LIBRARIES = ("muon", "schedulefree", "lion", "adafactor", "paged_adamw8bit")
"""Those that have a file, KIND.yaml, are trained."""


def stop(view: View) -> None:
    if view.step == 3:
        raise InterruptedError


def terminate_the_second(view: View) -> None:
    if view.step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)


def keep(run: Path, view: View) -> None:
    if view.last:
        save_file(dict(view.weights), run.with_name(f"{run.name}-{os.environ['RANK']}.safetensors"))


def main(folder: Path) -> None:
    genuine = LoraMethod.export

    def noted(self: LoraMethod, where: Path, *rest: object) -> Path:
        with (folder / f"exports-{os.environ['RANK']}.txt").open("a") as file:
            file.write(f"{where.relative_to(folder)}\n")
        return genuine(self, where, *rest)  # type: ignore[arg-type]

    def config(name: str) -> Config:
        return load_config(folder / f"{name}.yaml").config

    LoraMethod.export = noted  # type: ignore[method-assign,assignment]
    train.closing_process_group = contextlib.nullcontext  # type: ignore[assignment]  # one group serves all runs
    (folder / f"exports-{os.environ['RANK']}.txt").touch()
    train.run_training(config("straight"))
    with contextlib.suppress(InterruptedError):
        train.run_training(config("stopped"), callbacks=[stop])
    with contextlib.suppress(RunError):
        train.run_training(config("stopped"), resume=True, callbacks=[terminate_the_second])
    train.run_training(config("stopped"), resume=True)
    given = [kind for kind in OPTIMIZERS_OF_LIBRARIES if (folder / f"{kind}.yaml").is_file()]
    for name in ("prodigy", *given, "scratch", "broken"):
        if name == "broken" and os.environ["RANK"] == "1":
            import bitsandbytes.functional

            del bitsandbytes.functional.create_dynamic_map
        train.run_training(config(name), callbacks=[lambda view, name=name: keep(folder / name, view)])
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
