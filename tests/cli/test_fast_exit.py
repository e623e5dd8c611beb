"""A command's process ends at once, and yet as if it had ended by itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMAND = """
import atexit, sys, threading, time
from sd3tune.cli.fast_exit import exit_fast

class Left:
    def __del__(self):
        print("taken apart")

left = Left()
left.cycle = left

def command():
    atexit.register(print, "registered")
    print("done")
    {ends}

exit_fast(command)
"""


def ended(ends: str) -> subprocess.CompletedProcess[str]:
    """The command, its output in a pipe, where it is buffered."""
    return subprocess.run(
        [sys.executable, "-c", COMMAND.format(ends=ends)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("ends", "code"), [("pass", 0), ("sys.exit()", 0), ("sys.exit(2)", 2), ("raise SystemExit(130)", 130)]
)
def test_the_exit_code_and_all_output_arrive_and_nothing_is_taken_apart(ends: str, code: int) -> None:
    ran = ended(ends)
    assert (ran.returncode, ran.stdout.splitlines(), ran.stderr) == (code, ["done", "registered"], "")


def test_an_error_keeps_its_traceback() -> None:
    ran = ended("raise ValueError('ours')")
    assert ran.returncode == 1
    assert ran.stderr.endswith("ValueError: ours\n")


def test_a_message_as_exit_code_is_printed() -> None:
    ran = ended("sys.exit('too bad')")
    assert (ran.returncode, ran.stderr) == (1, "too bad\n")


def test_threads_are_waited_for() -> None:
    ran = ended("threading.Timer(0.2, print, ['later']).start()")
    assert (ran.returncode, ran.stdout.splitlines()) == (0, ["done", "later", "registered"])


def test_output_that_nobody_reads_is_a_failure_and_no_traceback() -> None:
    reads, writes = os.pipe()
    os.close(reads)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    ran = subprocess.run(
        [sys.executable, "-c", COMMAND.format(ends="pass")],
        env=environment,
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writes)
    assert (ran.returncode, ran.stderr) == (120, "")
