"""`preset.py FOLDER PRESET BASE KEY=VALUE ...`: a preset's first steps by the command line, with the base in a folder.

Its facts: the `outcome`, in a line; whether all segments were `expandable`; and the allocator's peaks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sd3tune.cli import main as cli  # imports no torch, which reads its settings of memory when it is imported
from tests.nullgpu.counts import fact

ROOT = Path(__file__).parents[3]
SHORT = ("train.steps=2", "schedule.warmup_steps=0", "checkpoint.every=2", "preview.every=2", "preview.steps=2")
quick_imports = cli.quick_imports


def overrides(base: Path) -> list[str]:
    """Return what makes a preset short, and its places."""
    return [*SHORT, f"model.base={base}", f"data.sources.0.path={ROOT / 'sd3tune' / 'assets' / 'demo'}"]


@contextmanager
def imports_with_results(activity: str) -> Iterator[None]:
    with quick_imports(activity):
        yield
    from tests.nullgpu.programs.matrix import with_results

    with_results()


def main(folder: Path, preset: str, base: Path, more: list[str]) -> None:
    cli.quick_imports = imports_with_results
    file = ROOT / "configs" / f"{preset}.yaml"
    sys.argv = ["sd3tune", "train", str(file), *overrides(base), *more, f"output_dir={folder / 'run'}"]
    try:
        cli.run()
    except SystemExit as stopped:
        fact("outcome", f"exit code {stopped.code}")
    else:
        fact("outcome", "finished")
    import torch

    segments = torch.cuda.memory_snapshot()
    fact("expandable", bool(segments) and all(segment["is_expandable"] for segment in segments))
    fact("peaks", [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
