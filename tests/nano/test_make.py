"""The end of nano's build: what was measured, and that packaged weights are never lost."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from examples.nano import make
from examples.nano.measure_nano import kind, wilson
from sd3tune.model.base import offline
from sd3tune.nano.tasks import rich_tasks

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A built nano with other weights than the packaged one, whose folder is a copy."""
    packaged, built = tmp_path / "packaged", tmp_path / "built"
    for folder in (packaged, built):
        shutil.copytree(offline.NANO_FOLDER, folder)
    save_file({name: tensor * 0.5 for name, tensor in load_file(built / WEIGHTS).items()}, built / WEIGHTS)
    monkeypatch.setattr(make, "SHIPPED", packaged)
    monkeypatch.setattr(make, "BUILT", built)
    monkeypatch.setitem(offline._NANO_FOLDERS, "nano", packaged)
    return built


def test_packaged_weights_without_another_name_are_not_replaced(built: Path) -> None:
    before = (make.SHIPPED / WEIGHTS).read_bytes()
    with pytest.raises(SystemExit, match="move them to sd3tune/assets/nano-N"):
        make.main(["--ship"])
    assert (make.SHIPPED / WEIGHTS).read_bytes() == before


def test_weights_with_a_name_of_their_own_are_replaced(built: Path) -> None:
    shutil.rmtree(make.SHIPPED)
    shutil.copytree(offline.offline_folder("nano-1"), make.SHIPPED)
    make.main(["--ship"])
    assert (make.SHIPPED / WEIGHTS).read_bytes() == (built / WEIGHTS).read_bytes()


def test_nothing_is_shipped_before_it_is_built(built: Path) -> None:
    (built / "model_index.json").unlink()
    with pytest.raises(SystemExit, match="not built yet"):
        make.main(["--ship"])


def test_the_interval_of_a_share() -> None:
    assert wilson(74, 100) == pytest.approx((0.6463, 0.8160), abs=1e-4)  # worked out by hand
    assert wilson(0, 20)[0] == pytest.approx(0, abs=1e-9)


def test_rich_tasks_have_all_kinds() -> None:
    kinds = {kind(task) for task in rich_tasks(60, False, 0)}
    assert kinds == {"two things", "striped", "dotted", "place or size"}
