"""Processes on several machines, stood for by groups of processes with folders of their own."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch

from sd3tune.config import dump_config
from sd3tune.data.store import Store
from sd3tune.errors import UserError
from sd3tune.run.machines import check_same_data, check_same_start, processes_sharing, ranks_sharing, resume_everywhere
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.processes import processes_of
from sd3tune.training.checkpoint import list_checkpoints
from tests.forks import FORKS

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def problem_of(check, *arguments: object) -> str | None:
    try:
        check(*arguments, CPU)
    except UserError as error:
        return error.problems[0]
    return None


def rank(number: int, port: int, root: Path, answers: Connection) -> None:
    """Ranks 0 and 1 are on one machine, with a run of two checkpoints, and rank 2 on another."""
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number % 2), "WORLD_SIZE": "3", "ACCELERATE_USE_CPU": "true",
        "LOCAL_WORLD_SIZE": "2" if number < 2 else "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    processes = processes_of(make_accelerator())
    machine = root / ("first" if number < 2 else "second")
    run, identity = machine / "run", {"data": {"images": "a", "prior": number}}
    answers.send(ranks_sharing([machine / "store"], processes, CPU))
    divided = processes_sharing([machine / "store", root / "all"], processes, CPU)
    answers.send((divided.rank, divided.world))
    answers.send(problem_of(check_same_data, identity, processes))
    answers.send(problem_of(check_same_data, {"data": {"images": str(number // 2)}}, processes))
    answers.send(resume_everywhere(run, number == 0, processes, CPU))
    answers.send([path.name for path in list_checkpoints(run)])
    answers.send(problem_of(check_same_start, list_checkpoints(run)[-1], processes))
    answers.send(problem_of(check_same_start, None if number else list_checkpoints(run)[-1], processes))


def test_machines_share_what_they_can_and_get_the_rest_from_rank_0(tmp_path: Path) -> None:
    for step in ("000002", "000004"):
        folder = tmp_path / "first" / "run" / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(step)
    (tmp_path / "first" / "run" / "metrics.jsonl").write_text("{}\n")
    old = tmp_path / "second" / "run" / "checkpoints" / "step-000003"
    old.mkdir(parents=True)
    port, pipes = free_port(), [FORKS.Pipe() for _ in range(3)]
    started = [FORKS.Process(target=rank, args=(number, port, tmp_path, pipes[number][1])) for number in range(3)]
    for process in started:
        process.start()
    try:
        found = []
        for ours, _ in pipes:
            found.append([])
            for _ in range(8):
                assert ours.poll(60)
                found[-1].append(ours.recv())
    finally:
        for process in started:
            process.kill()
    others = "process 2: other images, captions, base or settings than process 0; copy the same data"
    starts = "process 0 has the checkpoint of step 4, and process 1 has no checkpoint in its run folder; empty"
    for number, (ranks, place, same, differing, resumes, checkpoints, equal, unequal) in enumerate(found):
        assert ranks == ([0, 1] if number < 2 else [2])
        assert place == ((number, 2) if number < 2 else (0, 1))
        assert (same, resumes, equal) == (None, True, None)
        assert differing.startswith(others)
        assert unequal.startswith(starts)
        assert checkpoints == (["step-000002", "step-000004"] if number < 2 else ["step-000004"])
    assert (tmp_path / "second" / "run" / "checkpoints" / "step-000004" / "state.json").read_text() == "000004"
    assert (tmp_path / "second" / "run" / "metrics.jsonl").read_text() == "{}\n"
    assert not list(tmp_path.rglob(".tmp-*"))


SETTINGS = (
    "data.flip=true", "validation={holdout: 1, every: 2}", "checkpoint={every: 2, keep: 2}", "train.process_timeout=2",
)  # fmt: skip


@pytest.mark.long
def test_two_machines_without_a_shared_disk_train_and_resume_as_one(
    quick_config, tiny_images: Path, tmp_path: Path, start_cli, assert_equal_runs, monkeypatch
) -> None:
    """Each has its own photos, base, store and run folder; torchrun starts each with --nnodes 2."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    def files(*overrides: str) -> list[Path]:
        found = []
        for machine in ("first", "second"):
            if not (tmp_path / machine / "photos").exists():
                shutil.copytree(tiny_images, tmp_path / machine / "photos")
            config = quick_config(tmp_path / machine / "run", *SETTINGS, *overrides)
            sources = [config.data.sources[0].model_copy(update={"path": str(tmp_path / machine / "photos")})]
            config = config.model_copy(update={"data": config.data.model_copy(update={"sources": sources})})
            found.append(tmp_path / machine / "run.yaml")
            found[-1].write_text(dump_config(config))
        return found

    def launched(*more: str, overrides: tuple[str, ...] = ()) -> list[tuple[int, str, str]]:
        port, started = free_port(), []
        for number, file in enumerate(files(*overrides)):
            monkeypatch.setenv("SD3TUNE_CACHE", str(file.parent / "cache"))
            prefix = (sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(number))
            prefix += ("--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", str(port))
            started.append(start_cli("train", file, *more, prefix=(*prefix, "-m", "sd3tune")))
        printed = [process.communicate(timeout=300) for process in started]
        return [(process.returncode, *texts) for process, texts in zip(started, printed, strict=True)]

    both = launched(overrides=("train.steps=4",))
    assert [code for code, _, _ in both] == [0, 0], both[1][2]
    stores = [Store(tmp_path / machine / "cache" / "store") for machine in ("first", "second")]
    assert len(stores[0]) == len(stores[1]) > 0
    assert not list((tmp_path / "second").glob("run/*"))

    first, _ = launched("--resume", overrides=("train.steps=8",))
    assert first[0] == 0, first[2]
    assert "resuming from step-000004" in first[1]
    assert [path.name for path in list_checkpoints(tmp_path / "second" / "run")] == ["step-000004"]

    finished = launched("--resume", overrides=("train.steps=8",))
    assert [code for code, _, _ in finished] == [0, 0]
    assert "already finished" in finished[0][1]

    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    for steps in ("4", "8"):
        (tmp_path / "one.yaml").write_text(
            dump_config(quick_config(tmp_path / "one", *SETTINGS, f"train.steps={steps}"))
        )
        one = start_cli("train", tmp_path / "one.yaml", "--num-processes", "2", "--resume")
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors
    assert_equal_runs(tmp_path / "one", tmp_path / "first" / "run")

    (tmp_path / "second" / "photos" / "0.txt").write_text("another caption")
    shutil.rmtree(tmp_path / "first" / "run")
    shutil.rmtree(tmp_path / "second" / "run")
    assert any("error: process 1: other images, captions" in errors for _, _, errors in launched())
