"""The errors a user can cause: one readable line per problem, each naming the thing and the way out."""

from __future__ import annotations

from sd3tune.reporting import escaped

LONGEST = 2000
"""Characters of a problem, which may quote a file; of a longer one the middle is left out."""
_END = 500
"""Of them, those that stand at the end, where the way out is."""


class UserError(Exception):
    """Something the user can fix. The command line prints each problem on its own line and ends with `exit_code`.

    Control characters of the names in a problem are written out (see `reporting.escaped`), so that it is one line, and
    of one that is longer than `LONGEST` the middle is left out.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(_shortened(escaped(problem)) for problem in problems)
        super().__init__("\n".join(self.problems))


def _shortened(line: str) -> str:
    return line if len(line) <= LONGEST else f"{line[: LONGEST - _END - 5]} ... {line[-_END:]}"


class ConfigError(UserError):
    """A YAML file, an override or a combination of keys."""


class DataError(UserError):
    """Images, captions and the folders that hold them."""


class ModelError(UserError):
    """A base model: missing, gated, incomplete or not readable."""


class AdapterError(UserError):
    """A LoRA file: not readable, for another base, or with nothing that matches."""


class RunError(UserError):
    """The machine and the run folder: devices, disk, locks, a run that cannot be resumed."""


class Interrupted(RunError):
    """Ctrl-C or SIGTERM, after what was finished has been saved."""

    exit_code = 130


class ProcessError(RunError):
    """Another process of the same command failed for a reason that it has printed itself."""

    exit_code = 1
