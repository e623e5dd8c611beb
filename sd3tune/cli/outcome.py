"""Exit codes, and one line per problem instead of a traceback."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from sd3tune.cli.usage import UsageError, usage_problem
from sd3tune.errors import Interrupted, UserError
from sd3tune.invocation import command_line
from sd3tune.reporting import say
from sd3tune.runtime.signals import StopSignals

EXIT_CODES = (
    "Exit codes: 0 done; 2 a mistake, a full disk or out of memory, with an error line that gives the fix; "
    "130 stopped by Ctrl-C or SIGTERM; 1 anything unexpected."
)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NO_ACCESS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)
_LONGEST_NAME = 200
"""Characters of a name that are shown."""


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Run the command line, print problems to stderr, and exit with one of `EXIT_CODES`.

    A bug keeps its traceback, and Python exits with 1. When the output is closed early, typer silently exits with 1.
    """
    _replace_unencodable_characters()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # fewer progress lines in a log
    try:
        with StopSignals():
            code = app(arguments, prog_name="sd3tune", standalone_mode=False)
    except UsageError as error:
        problem = usage_problem(error)
        _exit(2, *([] if problem is None else [problem]))
    except UserError as error:
        _exit(error.exit_code, *error.problems)
    except (KeyboardInterrupt, typer.Abort):
        code = Interrupted.exit_code
    except (ImportError, OSError, MemoryError, RuntimeError) as error:
        line = _in_one_line(error)
        if line is None:
            raise
        _exit(2, line)
    if code == Interrupted.exit_code:
        _exit(code, "stopped; every file that was written is complete, and the same command can be run again")
    if isinstance(code, int) and code:
        sys.exit(code)


def _exit(code: int, *problems: str) -> NoReturn:
    for problem in problems:
        say(f"error: {problem}")
    sys.exit(code)


def _replace_unencodable_characters() -> None:
    """Print `?` for characters that stdout cannot encode, instead of raising UnicodeEncodeError.

    Pipes on Windows, Latin-1 locales and PYTHONIOENCODING have limited encodings, and file names may contain bytes that
    are not UTF-8. stderr escapes such characters by default.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _in_one_line(error: Exception) -> str | None:
    """Return the line for a failure that is not a bug; None for a bug."""
    if isinstance(error, ImportError):
        return _missing_library(error)
    if isinstance(error, OSError):
        return _full_disk(error) or _no_access(error)
    return _out_of_memory(error)


def _full_disk(error: OSError) -> str | None:
    """Return the line for a failed write to a full or read-only disk; None for other errors."""
    if error.errno not in _NO_ROOM:
        return None
    return f"{error.filename or 'a file'}: cannot be written: {error.strerror}; free some space, or use another disk"


def _no_access(error: OSError) -> str | None:
    """For a name that no file can have, or a file that only others may use."""
    if error.errno not in _NO_ACCESS or error.filename is None:
        return None
    name = os.fsdecode(error.filename)
    shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    way_out = "check its permissions" if isinstance(error, PermissionError) else "give another name"
    return f"{shown}: cannot be used: {error.strerror}; {way_out}"


def _out_of_memory(error: Exception) -> str | None:
    """Return the line for out of memory on any device that no command has explained; None for other errors."""
    if "torch" in sys.modules:
        from sd3tune.runtime.out_of_memory import is_out_of_memory

        if not is_out_of_memory(error):
            return None
    elif not isinstance(error, MemoryError):
        return None
    return "out of memory; close other programs, or use a smaller base, resolution or batch"


def _missing_library(error: ImportError) -> str | None:
    """Return the line for a library that is missing or incompatible; None for other import errors."""
    library, _, inside = (error.name or "").partition(".")
    if not library or library == "sd3tune" or library in sys.stdlib_module_names:
        return None
    doctor = command_line("sd3tune", "doctor")
    if isinstance(error, ModuleNotFoundError) and not inside:
        return f"the library {library!r} is not installed; `{doctor}` lists missing libraries and how to install them"
    reason = " ".join(str(error).split())[:300]
    return f"the library {library!r} is not compatible: {reason}; `{doctor}` lists the supported versions"
