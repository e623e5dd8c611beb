"""The command line in a process of its own: a new interpreter, or a fork of one that has imported the libraries."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.forks import FORKS

ROOT = Path(__file__).parents[2]
UNABLE = 77

Snapshot = dict[str, str]


class Unable(Exception):
    """This machine does not let a test have what it needs."""


@dataclass(frozen=True)
class Finished:
    code: int
    printed: str
    before: Snapshot
    after: Snapshot


def snapshot(folder: Path) -> Snapshot:
    """Path -> what is there, as far as it may be read; encodings and downloads left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not {"store", "bases", "hf"} & set(name.split("/")):
            found[name] = _content(path)
    return found


def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    except PermissionError:
        return "not for us"


def fresh(command: Sequence[str], folder: Path, environment: Mapping[str, str], path: Path | None = None) -> Finished:
    """Run the command in a new interpreter; what lies in `path` is found before anything else."""
    paths = os.pathsep.join(map(str, filter(None, (path, ROOT))))
    before = snapshot(folder)
    done = subprocess.run(
        [sys.executable, "-m", "sd3tune", *command],
        cwd=folder,
        env={**environment, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=False,
    )
    return Finished(done.returncode, done.stdout, before, snapshot(folder))


def forked(
    command: Sequence[str], folder: Path, environment: Mapping[str, str], inside: Callable[[], object], notes: Path
) -> Finished:
    """Run the command in a process that is forked and lives in `folder`; `inside` is called there first."""
    process = FORKS.Process(target=_run, args=(command, str(folder), dict(environment), inside, str(notes)))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "still running"
    printed = (notes / "printed").read_text()
    if process.exitcode == UNABLE:
        raise Unable(printed.strip())
    return Finished(process.exitcode, printed, *json.loads((notes / "files").read_text()))


def _run(command: Sequence[str], folder: str, environment: dict[str, str], inside: Callable[[], object], notes: str):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(f"{notes}/printed", os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    noted = os.open(f"{notes}/files", os.O_WRONLY | os.O_CREAT)
    from sd3tune.cli.main import run

    try:
        inside()
    except Unable as reason:
        print(reason)
        sys.exit(UNABLE)
    before = snapshot(Path())
    sys.argv = ["sd3tune", *command]
    try:
        run()
    finally:
        os.write(noted, json.dumps([before, snapshot(Path())]).encode())


# What `inside` may do; each of it ends with the process.

_LIBC = ctypes.CDLL(None, use_errno=True)
_DAC = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: to read and write what one may not
_READ_ONLY = 1  # MS_RDONLY


def obey_permissions() -> None:
    """Root, too, may from now on read and write only what the files' permissions say."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    _system(_LIBC.capget, header, sets)
    sets[0] &= ~_DAC
    sets[1] &= ~_DAC
    _system(_LIBC.capset, header, sets)


def small_disk(folder: str, size: str, read_only: bool = False) -> None:
    """Mount a file system of that size over a folder, seen by this process alone."""
    private = 0x4000 | 1 << 18  # MS_REC | MS_PRIVATE
    _system(_LIBC.unshare, 0x20000)  # CLONE_NEWNS
    _system(_LIBC.mount, b"none", b"/", None, private, None)
    _system(_LIBC.mount, b"none", folder.encode(), b"tmpfs", _READ_ONLY * read_only, f"size={size}".encode())


def move_mount(source: Path, target: Path) -> None:
    """What is mounted at one place is from now on at another, after `small_disk`."""
    _system(_LIBC.mount, bytes(source), bytes(target), None, 0x2000, None)  # MS_MOVE


def small_files(size: int) -> None:
    """Writing more than that into one file fails from now on."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def without_library(name: str) -> None:
    """From now on no finder finds it."""
    if any(module.split(".")[0] == name for module in sys.modules):
        raise Unable(f"{name} is imported already")
    sys.meta_path.insert(0, _Absent(name))


class _Absent:
    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.split(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _system(call: Callable[..., int], *arguments: object) -> None:
    if call(*arguments) != 0:
        raise Unable(f"{call.__name__}: {os.strerror(ctypes.get_errno())}")
