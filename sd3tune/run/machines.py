"""Processes on several machines: which of them share a folder, what rank 0 sends to the others, and equal data.

Where folders are not shared, each machine encodes all data into its own store, and rank 0 alone writes the run folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sd3tune.config.run_folder import METRICS_FILE, RUN_FILE, VALIDATION_FILE
from sd3tune.errors import DataError, RunError
from sd3tune.files.atomic import TEMPORARY, make_folder, new_folder, write_bytes
from sd3tune.run.folder import EVALUATIONS_FILE, continues_launch
from sd3tune.runtime.processes import Processes, from_main
from sd3tune.training.checkpoint import list_checkpoints, prune

_FILES = (RUN_FILE, METRICS_FILE, VALIDATION_FILE, EVALUATIONS_FILE)
"""Files of a run that every process reads when it resumes."""


def on_one_machine(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the launcher states that all processes are on this machine."""
    return environment.get("LOCAL_WORLD_SIZE", "") == environment.get("WORLD_SIZE", "1")


def ranks_sharing(folders: Iterable[Path], processes: Processes, device: torch.device) -> list[int]:
    """Return the ranks, in order, that see the same `folders` as this process.

    Each leaves a file in them for the others, unless all are on one machine. Every process must call it. Raises
    RunError for a folder that cannot be written to.
    """
    if processes.world == 1 or on_one_machine():
        return list(range(processes.world))
    mark = int(processes.gather(torch.tensor(secrets.randbits(62), device=device))[0])
    seen, own = set(range(processes.world)), list[Path]()
    for folder in folders:
        try:
            make_folder(folder)
            own.append(folder / f"{TEMPORARY}{mark:016x}-rank-{processes.rank}")
            own[-1].touch()
        except OSError as error:
            raise RunError(f"{folder}: cannot be written to: {error.strerror}; choose another folder") from error
    processes.wait()
    for file in own:
        seen &= {int(path.name.rpartition("-")[2]) for path in file.parent.glob(f"{TEMPORARY}{mark:016x}-rank-*")}
    processes.wait()
    for file in own:
        file.unlink(missing_ok=True)
    return sorted(seen)


def processes_sharing(folders: Iterable[Path], processes: Processes, device: torch.device) -> Processes:
    """Return the processes with rank and number among those that see the same `folders`, to divide work on them."""
    ranks = ranks_sharing(folders, processes, device)
    return replace(processes, rank=ranks.index(processes.rank), world=len(ranks))


def resume_everywhere(run: Path, resume: bool, processes: Processes, device: torch.device) -> bool:
    """Return whether all processes resume, as rank 0 finds it, and give the newest checkpoint to other machines.

    A launcher that has restarted the processes resumes, too (see `continues_launch`). Raises RunError.
    """
    if processes.world == 1:
        return resume or continues_launch(run)
    resume = from_main(resume or continues_launch(run) if processes.is_main else None, device)
    if not resume or on_one_machine():
        return resume
    newest = from_main(list_checkpoints(run)[-1].name if processes.is_main and list_checkpoints(run) else None, device)
    if newest is not None:
        _send_checkpoint(run, Path("checkpoints") / newest, processes, device)
    return resume


def _send_checkpoint(run: Path, checkpoint: Path, processes: Processes, device: torch.device) -> None:
    """Write rank 0's checkpoint and measurements into the run folder of every machine that does not share it."""
    ranks = ranks_sharing([run], processes, device)
    receives = 0 not in ranks and ranks[0] == processes.rank
    inside = sorted(path.relative_to(run) for path in (run / checkpoint).rglob("*") if path.is_file())
    names = from_main([*inside, *(Path(name) for name in _FILES if (run / name).is_file())], device)
    received = {name: from_main((run / name).read_bytes() if processes.is_main else None, device) for name in names}
    if receives:
        with new_folder(run / checkpoint) as folder:
            for name in names:
                if name.is_relative_to(checkpoint):
                    write_bytes(folder / name.relative_to(checkpoint), received[name])
        for name in names:
            if not name.is_relative_to(checkpoint):
                write_bytes(run / name, received[name])
        prune(run, keep=1)
    processes.wait()


def found_by_main(found: bool, processes: Processes, device: torch.device) -> bool:
    """Return what rank 0 found in the run folder, which others may not see."""
    return found if processes.world == 1 else bool(from_main(found, device))


def check_same_start(start: Path | None, processes: Processes, device: torch.device) -> None:
    """Raise RunError if the processes would begin at different steps, as with leftovers on one machine."""
    step = -1 if start is None else int(start.name.rpartition("-")[2])
    steps = processes.gather(torch.tensor(step, device=device)).flatten().tolist()
    for rank, other in enumerate(steps):
        if other != steps[0]:
            begins = ["no checkpoint" if one < 0 else f"the checkpoint of step {one}" for one in (steps[0], other)]
            raise RunError(
                f"process 0 has {begins[0]}, and process {rank} has {begins[1]} in its run folder; empty the folder "
                "on the machines without process 0"
            )


def check_same_data(identity: Mapping[str, Any], processes: Processes, device: torch.device) -> None:
    """Raise DataError if the processes have other images, captions or settings than process 0.

    `identity` is that of `run_identity`. Class images, which machines may have drawn for themselves, are left out.
    """
    if processes.world == 1:
        return
    compared = {**identity, "data": {key: of for key, of in identity["data"].items() if key != "prior"}}
    digest = hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).digest()
    digests = processes.gather(torch.tensor(int.from_bytes(digest[:7], "big"), device=device)).flatten().tolist()
    differing = [str(rank) for rank, other in enumerate(digests) if other != digests[0]]
    if differing:
        raise DataError(
            f"process{'es' * (len(differing) > 1)} {', '.join(differing)}: other images, captions, base or settings "
            "than process 0; copy the same data and configuration to every machine"
        )
