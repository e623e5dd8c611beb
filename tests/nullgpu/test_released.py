"""A released model at full size goes from the shards of its folder to the GPU, and takes there what its plan says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.released_models import empty_model, write_repository, write_shards

PROGRAM = Path(__file__).with_name("programs") / "released.py"
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository of SD3.5-medium, with its transformer in three shards."""
    folder = write_repository("sd35-medium", tmp_path_factory.mktemp("bases") / "medium")
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    tensors = empty_model("sd35-medium", "transformer").state_dict()
    halved = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    write_shards(folder / "transformer", "diffusion_pytorch_model", "", halved, "2GB")
    assert len(list((folder / "transformer").glob("*-of-00003.safetensors"))) == 3
    return folder


@pytest.mark.long  # 20 s of CPU and 4 GB of memory for each
@pytest.mark.parametrize(
    ("preset", "capability", "dtype", "more"),
    [
        ("sd35_medium_24gb.yaml", 89, torch.bfloat16, ()),
        ("sd35_medium_t4.yaml", 75, torch.float16, ()),
        ("sd35_medium_t4.yaml", 75, torch.float16, ("train.swap_blocks=24",)),
    ],
)
def test_its_shards_take_what_the_plan_says(
    null_gpu,
    medium: Path,
    tiny_images: Path,
    tmp_path: Path,
    preset: str,
    capability: int,
    dtype: torch.dtype,
    more: tuple[str, ...],
) -> None:
    """In system memory, weights that are stored in bf16 and used in it stay in their files."""
    settings = (f"model.base={medium}", f"data.sources.0.path={tiny_images}", f"output_dir={tmp_path / 'run'}", *more)
    ran = null_gpu(PROGRAM, CONFIGS / preset, *settings, gb=15.8, capability=capability).succeeded()
    assert ran.facts["allocated"] == pytest.approx(ran.facts["planned"], rel=0.001)
    assert (ran.facts["dtype"], ran.facts["devices"]) == (str(dtype), ["cuda"])
    assert more or ran.facts["allocated"] > 2.9e9
    if dtype is torch.bfloat16:
        assert ran.facts["system"] < ran.facts["planned_system"]
    else:
        assert ran.facts["system"] == pytest.approx(ran.facts["planned_system"], rel=0.02)
