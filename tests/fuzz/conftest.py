"""Says at the end what was tried."""

from __future__ import annotations

import pytest

from tests.fuzz.door import CALLS


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, (calls, refused) in CALLS.items():
        terminalreporter.write_line(f"fuzz: {name}: {calls} calls, {refused} refused")
