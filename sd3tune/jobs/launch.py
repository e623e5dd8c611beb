"""`--num-processes N`: the same command again, under the launcher that works for the machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NoReturn

import torch

from sd3tune.errors import RunError
from sd3tune.jobs.machine import launched_by_a_launcher


def relaunch(count: int, arguments: Sequence[str]) -> NoReturn:
    """Run `sd3tune ARGUMENTS` in `count` processes and exit with the launcher's code.

    On GPUs that is accelerate; on the CPU torch's own launcher, as accelerate starts one process there whatever
    the number asked for. Raises RunError when the GPUs do not suffice.
    """
    if launched_by_a_launcher():
        raise RunError("--num-processes: this process was started by a launcher already; give the number to it alone")
    gpus = torch.cuda.device_count()
    if 0 < gpus < count:
        raise RunError(f"--num-processes {count}: this machine has {gpus} GPU{'s' * (gpus > 1)}")
    command = ["-m", "sd3tune", *without_option(arguments)]
    if gpus:
        launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(count)]
        environment = {}
    else:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        threads = max(1, (os.cpu_count() or 1) // count)
        environment = {
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
    # The package is found again even when this process ran from a folder that is not installed.
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    finished = subprocess.run([sys.executable, *launcher, *command], env={**os.environ, **environment}, check=False)
    sys.exit(finished.returncode)


def without_option(arguments: Sequence[str]) -> list[str]:
    """The arguments without `--num-processes N` or `--num-processes=N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == "--num-processes":
            skip = True
        elif not argument.startswith("--num-processes="):
            kept.append(argument)
    return kept
