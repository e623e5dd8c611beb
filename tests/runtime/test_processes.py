"""Processes of a training, forked: how they average, and how long they wait for each other."""

from __future__ import annotations

import os
import signal
import socket
import time
from multiprocessing.connection import Connection

import pytest
import torch
from accelerate import Accelerator

from sd3tune.errors import RunError
from sd3tune.runtime import arrivals
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.processes import explain_timeout, processes_of
from tests.forks import FORKS

TIMEOUT_MINUTES, WORLD = 0.05, 3


def joined(number: int, port: int) -> Accelerator:
    os.environ |= {
        "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(WORLD), "ACCELERATE_USE_CPU": "true",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    return make_accelerator(timeout_minutes=TIMEOUT_MINUTES)


def rank(number: int, port: int, answers: Connection) -> None:
    accelerator = joined(number, port)
    processes = processes_of(accelerator)
    values = torch.randn(1000, generator=torch.Generator().manual_seed(number))
    expected = accelerator.reduce(values, reduction="mean")
    averaged = processes.reduce_mean(values)
    answers.send((torch.equal(averaged, expected), averaged.data_ptr() == values.data_ptr()))
    if number == 0:
        answers.poll(60)  # late, until the others have given up
        return
    started, warnings = time.monotonic(), list[str]()
    arrivals.say = warnings.append
    try:
        with explain_timeout(TIMEOUT_MINUTES):
            processes.wait()
    except RunError as error:
        answers.send((time.monotonic() - started, error.problems, warnings))


def waiting_rank(number: int, port: int, answers: Connection) -> None:
    """A rank that has arrived wherever the others have, and answers each message with the missing ranks."""
    processes = processes_of(joined(number, port))
    with arrivals.naming_missing_ranks(TIMEOUT_MINUTES):
        processes.wait()
        while True:
            answers.send((os.getpid(), arrivals.missing_ranks()))
            answers.recv()


@pytest.fixture
def ranks(request: pytest.FixtureRequest):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = [FORKS.Pipe() for _ in range(WORLD)]
    started = [FORKS.Process(target=request.param, args=(number, port, pipes[number][1])) for number in range(WORLD)]
    for process in started:
        process.start()
    yield [ours for ours, _ in pipes]
    for process in started:
        process.kill()
        process.join()


@pytest.mark.parametrize("ranks", [rank], indirect=True)
def test_processes_average_in_place_and_give_up_after_the_timeout(ranks: list[Connection]) -> None:
    for one in ranks:
        assert one.poll(60)
        assert one.recv() == (True, True)
    for number in (1, 2):
        assert ranks[number].poll(60), "it waits for as long as torch does by default"
        seconds, (problem,), warnings = ranks[number].recv()
        assert seconds >= 60 * TIMEOUT_MINUTES - 0.1
        late = f"process {number} of 3 waited for 0 longer than train.process_timeout (0.05 minutes): "
        assert problem.startswith(late)
        assert [line.partition(" did not")[0] for line in warnings] == ["warning: process 0"][: number == 1]


@pytest.mark.parametrize("ranks", [waiting_rank], indirect=True)
def test_a_rank_that_is_stopped_after_it_arrived_is_named(ranks: list[Connection]) -> None:
    answers = []
    for one in ranks:
        assert one.poll(60)
        answers.append(one.recv())
    assert [absent for _, absent in answers] == [[], [], []]
    os.kill(answers[2][0], signal.SIGSTOP)
    for one in ranks[:2]:
        one.send("again")
        assert one.poll(60)
        assert one.recv()[1] == [2]


def test_other_errors_are_not_taken_for_a_timeout() -> None:
    for other in ("shapes", "Timed out waiting for a server"):
        with pytest.raises(RuntimeError, match=other), explain_timeout(1):
            raise RuntimeError(other)
