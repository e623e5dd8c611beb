"""`--num-processes N`: run the command again under the launcher for this machine."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

import torch

from sd3tune.errors import Interrupted, ProcessError, RunError, UserError
from sd3tune.runtime.environment import gpu_asked_for, launch_problems, no_gpu, restarts, sharding_problems

ERRORS = "SD3TUNE_ERRORS"
"""Folder for the problems of all processes of a command; the launching process prints each once, at the end."""
_STOPPED_CODES = (128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes of a launcher that was stopped by a signal."""
_PROGRAM = Path(__file__).resolve().parents[1] / "__main__.py"
"""Run by its path: with `-m sd3tune`, Python would import from the working directory first."""
_ACCELERATE = """\
import sys
if sys.path[0] == "":  # the working directory
    del sys.path[0]
from accelerate.commands.launch import main
main()
"""


def relaunch(count: int, arguments: Sequence[str], sharding: str = "none", most_restarts: int = 0) -> NoReturn:
    """Run `sd3tune ARGUMENTS` in `count` processes, and exit when all have ended. `sharding` is `train.sharding`.

    If one dies, all start again, up to `most_restarts` times; a training then continues from its last checkpoint.

    GPUs use accelerate's launcher, the CPU torch's: accelerate always starts a single process there. No process
    imports from the working directory. Raises RunError if there are too few GPUs, and UserError with the processes'
    problems.
    """
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal() and int(world) > 1:
        raise RunError("--num-processes: this process was started by a launcher already; set the number there instead")
    problems = launch_problems(os.environ) + sharding_problems(os.environ, sharding)
    gpus = torch.cuda.device_count()
    asked = gpu_asked_for(os.environ)
    if asked and not gpus:
        problems.append(no_gpu(asked))
    if problems:
        raise RunError(*problems)
    if 0 < gpus < count:
        raise RunError(f"--num-processes {count}: this machine has {gpus} GPU{'s' * (gpus > 1)}")
    command = [str(_PROGRAM), *without_option(without_option(arguments), "--restarts")]
    os.environ["PYTHONSAFEPATH"] = "1"  # also for child processes, from Python 3.11 on
    with tempfile.TemporaryDirectory(prefix="sd3tune-") as folder:
        os.environ[ERRORS] = folder
        code = (_on_gpus if gpus else _on_the_cpu)(count, command, most_restarts)
        files = sorted(Path(folder).iterdir())
        last = files[-1].name.partition("-")[0] if files and code else ""  # a restart may have mended the others
        left = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.name.startswith(f"{last}-")]
    if left:
        interrupted = all(error["exit_code"] == Interrupted.exit_code for error in left)
        lines = dict.fromkeys(line for error in left for line in error["problems"])
        raise (Interrupted if interrupted else UserError)(*lines)
    if code in _STOPPED_CODES:
        raise KeyboardInterrupt
    if code:
        raise ProcessError(
            f"--num-processes {count}: a process ended with exit code {code}; see its output above; run the same "
            "command with --resume to continue from the last checkpoint"
        )
    sys.exit(0)


@contextlib.contextmanager
def report_errors_to_launcher() -> Iterator[None]:
    """Pass a job's problems to the launching process, and exit with their code; does nothing without `relaunch`."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        yield
        return
    times = restarts(os.environ)
    try:
        yield
    except UserError as error:
        left = json.dumps({"exit_code": error.exit_code, "problems": error.problems})
        Path(folder, f"{times:04d}-{os.environ['RANK']}.json").write_text(left, encoding="utf-8")
        raise SystemExit(error.exit_code) from None
    except RuntimeError:
        # If a process ends, the next collective operation of the others fails: only the first problem counts.
        if any(Path(folder).glob(f"{times:04d}-*")):
            raise SystemExit(2) from None
        raise


def without_option(arguments: Sequence[str], option: str = "--num-processes") -> list[str]:
    """Return the arguments without `OPTION N` or `OPTION=N`."""
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == option:
            skip = True
        elif not argument.startswith(f"{option}="):
            kept.append(argument)
    return kept


def _on_gpus(count: int, command: Sequence[str], restarts: int = 0) -> int:
    launcher = [sys.executable, "-c", _ACCELERATE, "--multi_gpu", "--num_processes", str(count)]
    launcher += ["--max_restarts", str(restarts)]
    return subprocess.run([*launcher, *command], check=False).returncode


def _on_the_cpu(count: int, command: Sequence[str], restarts: int) -> int:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["ACCELERATE_USE_CPU"] = "true"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    logging.disable(logging.ERROR)  # it would log a long report on the end of the processes
    try:
        run.run(
            run.parse_args(["--standalone", "--nproc_per_node", str(count), "--max_restarts", str(restarts), *command])
        )
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except SignalException as error:
        return 128 + error.sigval
    return 0
