"""How commands end: 0, 2 with a line for each mistake, 130 when stopped, 1 for what nobody expected."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sd3tune.cli import main, outcome
from sd3tune.commands import plan
from sd3tune.config import dump_config
from sd3tune.errors import Interrupted, ProcessError, UserError
from sd3tune.inference import session
from sd3tune.run import encoding
from sd3tune.runtime import launch
from tests.conftest import Command


@pytest.fixture
def config_file(quick_config, tmp_path: Path) -> Path:
    file = tmp_path / "dog.yaml"
    file.write_text(dump_config(quick_config(tmp_path / "runs" / "dog", "name=dog", "train.steps=4")))
    return file


# Wrong usage.


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train", "missing argument 'CONFIG'; see `sd3tune train --help`"),
        ("train --nonsense x", "no such option: --nonsense; see `sd3tune train --help`"),
        ("train x.yaml --resum", "no such option: --resum (Possible options: --resume); see `sd3tune train --help`"),
        ("infer --num x", "invalid value for '--num': "),
        ("infer --prompt", "option '--prompt' requires an argument; see `sd3tune "),
        ("infer --base tiny --rank 4", "no such option: --rank"),
        ("base path", "missing argument 'name'; see `sd3tune base path --help`"),
        ("nonsense", "no such command 'nonsense'; see `sd3tune --help`"),
        ("train x.yaml --num-processes 0", "invalid value for '--num-processes': "),
        ("train x.yaml --steps 500", "--steps: settings are written as key=value; write train.steps=500"),
        ("train --steps=500 x.yaml", "--steps: settings are written as key=value; write train.steps=500"),
        ("train x.yaml --train.steps 500", "--train.steps: settings are written as key=value; write train.steps=500"),
        ("train x.yaml --train-batch-size 2", "write train.batch_size=2"),
        ("plan x.yaml --rank 8", "--rank: settings are written as key=value; write method.rank=8"),
        ("cache x.yaml --resolution 512", "write data.resolution=512"),
        ("config check x.yaml --lr 1e-4", "write optimizer.lr=1e-4"),
        ("data check x.yaml --trigger sks", "write data.trigger=sks"),
        ("train x.yaml --output_dir", "write output_dir=..."),
    ],
)
def test_wrong_usage_is_one_line(typed: str, said: str, command: Command) -> None:
    finished = command(*typed.split())
    assert (finished.code, finished.out) == (2, "")
    (line,) = finished.err.splitlines()
    assert line.startswith("error: ")
    assert said.lower() in line.lower()  # typer's own words differ between its versions


@pytest.mark.parametrize("typed", ["", "config", "hub", "lora"])
def test_a_command_alone_shows_its_help_once(typed: str, command: Command) -> None:
    finished = command(*typed.split())
    assert finished.code == 2
    assert (finished.out + finished.err).count("Usage: sd3tune") == 1
    assert "error" not in finished.err


def test_the_help_says_the_exit_codes(command: Command) -> None:
    said = " ".join(command("--help").out.split())
    assert outcome.EXIT_CODES in said


# Stopped.


@pytest.fixture
def _unlaunched(monkeypatch) -> None:
    """What launching sets in the environment is taken back after the test."""
    for name in (launch.ERRORS, "PYTHONPATH"):
        monkeypatch.setenv(name, "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("module", "function", "typed"),
    [
        (encoding, "Store", "train dog.yaml"),
        (encoding, "Store", "cache dog.yaml"),
        (plan, "plan_lines", "plan dog.yaml --memory 8"),
        (session, "encode_prompts", "infer --base tiny --prompt dog --size 64 --steps 1 --out out"),
    ],
    ids=lambda value: str(value).split()[0],
)
def test_a_signal_is_130_and_one_line(
    number: signal.Signals, module, function: str, typed: str, command: Command, config_file, monkeypatch, tmp_path
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        os.kill(os.getpid(), number)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, function, interrupted)
    before = signal.getsignal(number)
    finished = command(*typed.split())
    assert finished.code == 130
    (line,) = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert "stopped" in line
    assert "Traceback" not in finished.err
    assert signal.getsignal(number) is before


@pytest.mark.usefixtures("_unlaunched")
@pytest.mark.parametrize(
    ("left", "code"),
    [
        ([Interrupted("saved"), Interrupted("saved")], 130),
        ([Interrupted("saved"), UserError("a disk is full")], 2),
    ],
)
def test_what_processes_leave_to_the_one_that_launched_them_keeps_its_code(
    left: list[UserError], code: int, command: Command, config_file: Path, monkeypatch
) -> None:
    def end(count: int, arguments: object, restarts: int) -> int:
        for rank, error in enumerate(left):
            monkeypatch.setenv("RANK", str(rank))
            with pytest.raises(SystemExit) as ended, launch.report_errors_to_launcher():
                raise error
            assert ended.value.code == error.exit_code
        return 1

    monkeypatch.setattr(launch, "_on_the_cpu", end)
    finished = command("train", config_file, "--num-processes", 2)
    assert finished.code == code
    assert finished.err.splitlines() == list(dict.fromkeys(f"error: {error}" for error in left))


@pytest.mark.usefixtures("_unlaunched")
@pytest.mark.parametrize(("returned", "code"), [(130, 130), (143, 130), (1, 1), (-9, 1)])
def test_a_process_that_left_no_word_is_told_by_its_exit_code(
    returned: int, code: int, command: Command, config_file: Path, monkeypatch
) -> None:
    monkeypatch.setattr(launch, "_on_the_cpu", lambda count, arguments, restarts: returned)
    finished = command("train", config_file, "--num-processes", 2)
    assert finished.code == code
    assert len(finished.err.splitlines()) == 1


# What is no mistake of the configuration.


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            OSError(errno.ENAMETOOLONG, "File name too long", "x" * 300),
            f"{'x' * 200}...: cannot be used: File name",
        ),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "x.png"), "x.png: cannot be used: Too many levels"),
        (OSError(errno.EACCES, "Permission denied", b"x.png"), "x.png: cannot be used: Permission denied; check its"),
        (OSError(errno.ENOSPC, "No space left on device", "x.png"), "x.png: cannot be written: No space left"),
        (OSError(errno.EROFS, "Read-only file system"), "a file: cannot be written: Read-only file system"),
        (MemoryError(), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (ModuleNotFoundError("No module named 'peft'", name="peft"), "the library 'peft' is not installed"),
        (ProcessError("see above"), "see above"),
    ],
)
def test_the_machine_s_refusals_are_one_line(raised: Exception, said: str, command: Command, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise raised

    monkeypatch.setattr(outcome, "StopSignals", refuse)
    finished = command("config", "list")
    assert finished.code == (1 if isinstance(raised, ProcessError) else 2)
    (line,) = finished.err.splitlines()
    assert line.startswith(f"error: {said}")


@pytest.mark.parametrize("raised", [RuntimeError("shapes"), ValueError("x"), OSError(errno.EIO, "I/O"), KeyError("a")])
def test_a_bug_keeps_its_traceback(raised: Exception, monkeypatch) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(outcome, "StopSignals", fail)
    monkeypatch.setattr(sys, "argv", ["sd3tune", "config", "list"])
    with pytest.raises(type(raised)):
        main.run()


def test_output_that_nobody_reads_is_exit_code_1_in_silence() -> None:
    """A real process, as Python flushes once more at its end."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "sd3tune", "config", "list"], stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, b"")
