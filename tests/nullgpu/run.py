"""Python processes on the null GPU: `run_on_null_gpu` takes what follows `python` on a command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.nullgpu.build import LIBRARY, build
from tests.nullgpu.counts import FACTS

ROOT = Path(__file__).parents[2]
_OF_THE_TESTS = ("CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""Variables that a process does not inherit: the first hides GPUs from tests, the others may be left by one."""
SITE = Path(__file__).with_name("site")
"""Goes before all else on the import path: it switches cuDNN off."""


@dataclass(frozen=True)
class Ran:
    """A process that has ended."""

    code: int
    out: str
    err: str
    facts: dict[str, Any]
    """The facts that it stated by `counts.fact`."""

    def succeeded(self) -> Ran:
        """Return this, or raise AssertionError with the end of its output."""
        assert self.code == 0, f"exit code {self.code}\n{self.out[-2000:]}\n{self.err[-6000:]}"
        return self


def _cache() -> Path:
    """Return a cache apart from other tests': what is encoded here is zeros, under the keys of real encodings."""
    return Path(os.environ.get("SD3TUNE_CACHE", ROOT / "build")) / "nullgpu-cache"


def run_on_null_gpu(
    *arguments: str | Path,
    gb: float = 139.0,
    count: int = 1,
    capability: int = 90,
    fresh_memory: bool = False,
    cwd: Path = ROOT,
    timeout: float = 600.0,
    **environment: str,
) -> Ran:
    """Run Python with `arguments` where `count` GPUs of `gb` GB (1e9 bytes) and a compute capability seem to be.

    CUDA itself takes 0.6 GB of each. With `fresh_memory` every tensor on a GPU begins as zeros; otherwise torch's
    allocator reuses memory, in which the values of other tensors are left. Raises CannotBuild.
    """
    folder = build()
    with tempfile.TemporaryDirectory(prefix="nullgpu-") as place:
        facts = Path(place) / "facts.jsonl"
        facts.touch()
        inherited = {name: value for name, value in os.environ.items() if name not in _OF_THE_TESTS}
        found = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=cwd,
            timeout=timeout,
            capture_output=True,
            text=True,
            check=False,
            env={
                **inherited,
                "LD_PRELOAD": str(folder / LIBRARY),
                "LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH")))),
                "PYTHONPATH": os.pathsep.join(map(str, (SITE, ROOT))),
                "OMP_NUM_THREADS": "1",
                "SD3TUNE_CACHE": str(_cache()),
                "PYTHONFAULTHANDLER": "1",
                "NULLGPU_GB": str(gb),
                "NULLGPU_COUNT": str(count),
                "NULLGPU_CC": str(capability),
                **({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if fresh_memory else {}),
                FACTS: str(facts),
                **environment,
            },
        )
        told: dict[str, Any] = {}
        for line in facts.read_text(encoding="utf-8").splitlines():
            told.update(json.loads(line))
        return Ran(found.returncode, found.stdout, found.stderr, told)
