"""What runs where POSIX ends: no module needs `fcntl`, and files are synced as Windows allows it."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sd3tune
from sd3tune.config import dump_config
from sd3tune.files import atomic

PACKAGE = Path(sd3tune.__file__).parent
POSIX_ONLY = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "O_DIRECTORY", "O_NOFOLLOW", "SIGALRM", "SIGHUP", "SIGKILL", "SIGUSR1", "chown", "fork", "geteuid", "getuid",
    "killpg", "mkfifo", "setsid", "statvfs", "uname",
}  # fmt: skip

WITHOUT_FCNTL = """
import importlib, pkgutil, sys
sys.modules["fcntl"] = None
import sd3tune
from sd3tune.cli.imports import quick_imports
from sd3tune.cli.main import run

with quick_imports("train"):
    for module in pkgutil.walk_packages(sd3tune.__path__, "sd3tune."):
        if module.name not in ("sd3tune.__main__", "sd3tune.model.base.tokenizers.make"):
            importlib.import_module(module.name)
sys.argv = ["sd3tune", "train", sys.argv[1]]
run()
print("exclusive:", "fcntl" in sys.modules and sys.modules["fcntl"] is None)
"""


@pytest.mark.long
@pytest.mark.long
def test_every_module_is_imported_and_a_run_is_trained_without_fcntl(quick_config, tmp_path: Path, monkeypatch) -> None:
    """In a fresh interpreter; the tiny base is built there, and store and run folder are locked."""
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "run.yaml").write_text(dump_config(quick_config(tmp_path / "run", "train.steps=1")))
    command = [sys.executable, "-c", WITHOUT_FCNTL, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PACKAGE.parent, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("exclusive: True\n")
    assert (tmp_path / "run" / "adapter").is_dir()
    assert not list(tmp_path.rglob("*.lock"))  # those of file systems without locks go with their holder


def names_of_posix(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names} & POSIX_ONLY
        elif isinstance(node, ast.ImportFrom):
            found |= {(node.module or "").split(".")[0]} & POSIX_ONLY
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("os", "signal"):
            found |= {node.attr} & POSIX_NAMES
    return found


def test_no_module_names_what_only_posix_has() -> None:
    found = {path.name: names_of_posix(ast.parse(path.read_text(encoding="utf-8"))) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 100
    assert {name: names for name, names in found.items() if names} == {}
    assert names_of_posix(ast.parse("import fcntl; os.fork(); from pwd import getpwnam")) == {"fcntl", "fork", "pwd"}


def test_files_and_folders_are_written_where_folders_cannot_be_opened(tmp_path: Path, monkeypatch) -> None:
    opened: dict[int, tuple[str, int]] = {}
    system_open, system_fsync = os.open, os.fsync

    def windows_open(path: str, flags: int, *more: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        descriptor = system_open(path, flags, *more)
        opened[descriptor] = (str(path), flags)
        return descriptor

    def windows_fsync(descriptor: int) -> None:
        if opened[descriptor][1] & (os.O_RDWR | os.O_WRONLY) == 0:
            raise OSError(9, "Bad file descriptor")
        system_fsync(descriptor)

    monkeypatch.setattr(os, "open", windows_open)
    monkeypatch.setattr(os, "fsync", windows_fsync)
    monkeypatch.setattr(atomic, "_ON_WINDOWS", True)
    atomic.write_json(tmp_path / "a.json", {"a": 1})
    with atomic.new_folder(tmp_path / "folder") as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "x").write_text("x")
    assert (tmp_path / "folder" / "inside" / "x").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "folder"]
