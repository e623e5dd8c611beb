"""The first import of a job passes without a garbage collection, and leaves the collector as it was."""

from __future__ import annotations

import gc
import subprocess
import sys

from sd3tune.cli.imports import quick_imports

FIRST_IMPORT = """
import gc
from sd3tune.cli.imports import quick_imports

before = [of["collections"] for of in gc.get_stats()]
with quick_imports():
    import diffusers
after = [of["collections"] for of in gc.get_stats()]
print(after == before, gc.isenabled(), gc.get_freeze_count() > 100_000)
"""


def test_nothing_is_collected_during_the_first_import_nor_looked_at_later() -> None:
    ran = subprocess.run([sys.executable, "-c", FIRST_IMPORT], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == ["True", "True", "True"]


def test_where_all_is_imported_garbage_of_others_stays_collectable() -> None:
    import diffusers  # noqa: F401

    frozen = gc.get_freeze_count()
    with quick_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen
