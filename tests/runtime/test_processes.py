"""Two processes of a training, forked: how they average, and how long they wait for each other."""

from __future__ import annotations

import os
import socket
import time
from multiprocessing.connection import Connection

import pytest
import torch

from sd3tune.errors import RunError
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.processes import explain_timeout, processes_of
from tests.forks import FORKS

TIMEOUT_MINUTES = 0.02


def rank(number: int, port: int, answers: Connection) -> None:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    accelerator = make_accelerator(timeout_minutes=TIMEOUT_MINUTES)
    processes = processes_of(accelerator)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(number))
    expected = accelerator.reduce(values, reduction="mean")
    averaged = processes.reduce_mean(values)
    answers.send((torch.equal(averaged, expected), averaged.data_ptr() == values.data_ptr()))
    if number == 0:
        answers.poll(60)  # late, until the other has given up
        return
    started = time.monotonic()
    try:
        with explain_timeout(TIMEOUT_MINUTES):
            processes.wait()
    except RunError as error:
        answers.send((time.monotonic() - started, error.problems))


@pytest.fixture
def ranks():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORKS.Pipe() for _ in range(2)]
    started = [FORKS.Process(target=rank, args=(number, port, pipes[number][1])) for number in range(2)]
    for process in started:
        process.start()
    yield [ours for ours, _ in pipes]
    for process in started:
        process.kill()
        process.join()


def test_processes_average_in_place_and_give_up_after_the_timeout(ranks: list[Connection]) -> None:
    for one in ranks:
        assert one.poll(60)
        assert one.recv() == (True, True)
    assert ranks[1].poll(60), "it waits for as long as torch does by default"
    seconds, (problem,) = ranks[1].recv()
    assert seconds >= 60 * TIMEOUT_MINUTES - 0.1
    assert problem.startswith("process 1 of 2 waited for 0 longer than train.process_timeout (0.02 minutes): ")


def test_other_errors_are_not_taken_for_a_timeout() -> None:
    for other in ("shapes", "Timed out waiting for a server"):
        with pytest.raises(RuntimeError, match=other), explain_timeout(1):
            raise RuntimeError(other)
