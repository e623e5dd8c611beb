import pytest
import torch

from sd3tune.model.bases import resolve_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The tiny base, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SD3TUNE_CACHE", str(tmp_path_factory.mktemp("bases")))
        return resolve_base("tiny")


@pytest.fixture(autouse=True)
def _one_thread_count():
    """Bits are compared, and sums depend on the number of threads."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads
