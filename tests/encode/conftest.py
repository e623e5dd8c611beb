import gc
from collections.abc import Iterator

import pytest
import torch

from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import resolve_base


@pytest.fixture(scope="session")
def base() -> Base:
    return resolve_base("tiny")


@pytest.fixture(scope="session", autouse=True)
def _quick() -> Iterator[None]:
    """Imports are left out of the collections after each component; tiny models lose time on more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)
