"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from sd3tune.cli.main import run


@dataclass(frozen=True)
class Finished:
    code: int
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture
def command(monkeypatch, capfd) -> Command:
    """`command("infer", "--lora", ...)`: the command line in this process."""

    def command(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["sd3tune", *map(str, arguments)])
        monkeypatch.setenv("TQDM_MININTERVAL", "10")
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        try:
            run()
            code: object = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capfd.readouterr()
        assert isinstance(code, int)
        return Finished(code, printed.out, printed.err)

    return command
