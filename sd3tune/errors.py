"""The errors a user can cause: one readable line per problem, each naming the thing and the way out."""

from __future__ import annotations

from sd3tune.reporting import escaped


class UserError(Exception):
    """Something the user can fix. The command line prints each problem on its own line and ends with `exit_code`.

    Control characters of the names in a problem are written out (see `reporting.escaped`), so that it is one line.
    """

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        self.problems = tuple(map(escaped, problems))
        super().__init__("\n".join(self.problems))


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
