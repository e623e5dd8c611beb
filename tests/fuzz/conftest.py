"""Says at the end what was tried."""

from __future__ import annotations

import pytest

from tests.fuzz.door import TRIED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for progress in TRIED.values():
        terminalreporter.write_line(f"fuzz: {progress}")
