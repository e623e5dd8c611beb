"""Errors that a user can fix: one readable line per problem, which names the cause and the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sd3tune.reporting import escaped

LONGEST = 2000
"""Maximum characters of a problem, which may quote a file."""
_END = 500
"""Characters kept from the end, where the way out is."""


class UserError(Exception):
    """An error that the user can fix. The command line prints each problem on its own line, and exits with `exit_code`.

    Control characters in a problem are escaped (see `reporting.escaped`), so that it stays on one line. The middle of a
    problem longer than `LONGEST` is left out.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_shortened(escaped(problem)) for problem in problems)
        super().__init__("\n".join(self.problems))


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _END - 5]} ... {line[-_END:]}"


class ConfigError(UserError):
    """An invalid YAML file, override or combination of keys."""


class DataError(UserError):
    """Missing or invalid images, captions or data folders."""


class ModelError(UserError):
    """A base model that is missing, gated, incomplete or unreadable."""


class AdapterError(UserError):
    """A LoRA file that is unreadable, made for another base, or without matching modules."""


class MeasureUnavailable(UserError):
    """A measure that cannot be taken here: its model or package is missing, gated or unreadable."""


class RunError(UserError):
    """A problem with the machine or the run folder: devices, disk, locks, a run that cannot be resumed."""


class Interrupted(RunError):
    """Stopped by Ctrl-C or SIGTERM, after finished work has been saved."""

    exit_code = 130


class ProcessError(RunError):
    """Another process of the same command failed, and has printed the reason."""

    exit_code = 1


class Problems(list[str]):
    """The lines of several checks, so that a user sees all of them at once."""

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Add the lines of a UserError that ends the body."""
        try:
            yield
        except UserError as error:
            self += error.problems

    def raise_if_any(self) -> None:
        """Raise UserError with all lines, if there are any."""
        if self:
            raise UserError(*self)
