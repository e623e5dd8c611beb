"""The precision that a run gets, and what the environment may ask of a process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sd3tune.errors import RunError
from sd3tune.runtime.device import Gpu, choose_dtype, gpu_of
from sd3tune.runtime.environment import (
    drop_sharding,
    gpu_asked_for,
    grow_segments,
    launch_problems,
    sharding_ignored,
    sharding_problems,
)

T4, A100 = Gpu("Tesla T4", has_bf16=False), Gpu("NVIDIA A100", has_bf16=True)
WHOLE = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("wanted", "gpu", "dtype"),
    [
        ("auto", None, torch.float32),
        ("auto", T4, torch.float16),
        ("auto", A100, torch.bfloat16),
        ("bf16", None, torch.bfloat16),
        ("bf16", A100, torch.bfloat16),
        ("fp16", T4, torch.float16),
        ("fp32", A100, torch.float32),
    ],
)
def test_a_precision_that_the_gpu_has_is_taken(wanted: str, gpu: Gpu | None, dtype: torch.dtype) -> None:
    assert choose_dtype(wanted, gpu) is dtype


@pytest.mark.parametrize("asked_by", ["model.dtype", "--dtype"])
def test_bf16_on_a_gpu_without_it_is_refused_with_the_way_out(asked_by: str) -> None:
    with pytest.raises(RunError) as caught:
        choose_dtype("bf16", T4, asked_by)
    assert caught.value.problems == (f"{asked_by}: bf16: Tesla T4 has no bf16; use fp16 or auto",)


def test_the_cpu_is_no_gpu() -> None:
    assert gpu_of(torch.device("cpu")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_described_by_what_torch_knows_of_it() -> None:
    gpu = gpu_of(torch.device("cuda"))
    assert gpu is not None
    assert gpu.name == torch.cuda.get_device_name()
    assert gpu.has_bf16 == (torch.cuda.get_device_capability() >= (8, 0))


@pytest.mark.parametrize(
    "environment",
    [
        {},
        WHOLE,
        {**WHOLE, "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "1"},
        {"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"},
        {"LOCAL_RANK": "-1"},
        {"WORLD_SIZE": "", "MASTER_ADDR": "host", "MASTER_PORT": "1"},
    ],
)
def test_a_whole_launch_and_none_at_all_are_right(environment: dict[str, str]) -> None:
    assert launch_problems(environment) == []


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_what_a_launch_lacks_is_named(name: str) -> None:
    lacking = {key: value for key, value in WHOLE.items() if key != name}
    (line,) = launch_problems(lacking)
    assert line.startswith(f"WORLD_SIZE=2: set without {name}; ")


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ({"RANK": "2"}, ["RANK=2: at most 1 with WORLD_SIZE=2; "]),
        ({"WORLD_SIZE": "x", "RANK": "-3"}, ["WORLD_SIZE=x: not a whole number; ", "RANK=-3: not a whole number; "]),
        ({"WORLD_SIZE": ""}, ["RANK=1: set without WORLD_SIZE; ", "LOCAL_RANK=1: set without WORLD_SIZE; "]),
        ({"WORLD_SIZE": "1"}, ["RANK=1: at most 0 with", "LOCAL_RANK=1: at most 0 with"]),
    ],
)
def test_a_launch_that_contradicts_itself_has_a_line_for_each(change: dict[str, str], lines: list[str]) -> None:
    found = launch_problems({**WHOLE, **change})
    assert len(found) == len(lines)
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


@pytest.mark.parametrize(
    ("environment", "asks"),
    [
        ({}, False),
        ({"CUDA_VISIBLE_DEVICES": ""}, False),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, False),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, False),  # Slurm's word for none
        ({"CUDA_VISIBLE_DEVICES": "0"}, True),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1b2c"}, True),
        ({"CUDA_VISIBLE_DEVICES": "0", "ACCELERATE_USE_CPU": "True"}, False),
        ({"ACCELERATE_TORCH_DEVICE": "cuda:1"}, True),
        ({"ACCELERATE_TORCH_DEVICE": "cpu"}, False),
    ],
)
def test_a_gpu_is_asked_for_by_name_only(environment: dict[str, str], asks: bool) -> None:
    assert (gpu_asked_for(environment) is not None) == asks


@pytest.mark.parametrize("way", ["DEEPSPEED", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_way_to_split_the_model_is_refused_by_its_variable(way: str, tmp_path: Path) -> None:
    name, home = f"ACCELERATE_USE_{way}", {"HF_HOME": str(tmp_path)}
    for value in ("true", "True", "1"):
        (line,) = sharding_problems({name: value, "ACCELERATE_USE_CPU": "true", **home})
        assert line.startswith(f"{name}={value}: ")
        assert "set train.sharding=fsdp, " in line
        assert "write distributed_type: MULTI_GPU in the configuration of accelerate that sets it" in line
    assert sharding_problems({name: "false"}) == sharding_problems({name: ""}) == sharding_problems({}) == []


def test_fsdp_of_accelerate_is_what_train_sharding_asks_for(tmp_path: Path) -> None:
    environment = {"ACCELERATE_USE_FSDP": "true", "HF_HOME": str(tmp_path)}
    assert sharding_problems(environment, "fsdp") == []
    drop_sharding(environment)
    assert environment == {"HF_HOME": str(tmp_path)}


@pytest.mark.parametrize("way", ["DEEPSPEED", "MEGATRON_LM"])
def test_the_line_to_change_in_accelerate_s_configuration_is_named(way: str, tmp_path: Path) -> None:
    file = tmp_path / "accelerate" / "default_config.yaml"
    file.parent.mkdir()
    file.write_text(f"distributed_type: {way}\n")
    (line,) = sharding_problems({f"ACCELERATE_USE_{way}": "true", "HF_HOME": str(tmp_path)}, "fsdp")
    assert line.endswith(f"write distributed_type: MULTI_GPU in {file}")


def test_sharding_with_one_process_is_noted() -> None:
    (note,) = sharding_ignored({}, "fsdp", world=1)
    assert note.startswith("train.sharding: fsdp has no effect with one process")
    assert sharding_ignored({}, "fsdp", world=2) == []


@pytest.mark.parametrize("way", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_what_accelerate_s_own_configuration_asks_for_is_named(way: str, tmp_path: Path) -> None:
    yaml, as_json = (tmp_path / "accelerate" / f"default_config.{ending}" for ending in ("yaml", "json"))
    home = {"HF_HOME": str(tmp_path)}
    assert sharding_ignored(home) == []
    yaml.parent.mkdir()
    as_json.write_text(json.dumps({"distributed_type": way}))
    (note,) = sharding_ignored(home)
    assert note.startswith(f"{as_json} asks for ")
    yaml.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: {way}\n")
    (note,) = sharding_ignored({"XDG_CACHE_HOME": str(tmp_path), "HF_HOME": str(tmp_path)})
    assert note.startswith(f"{yaml} asks for ")
    assert "only `accelerate launch` reads it" in note


@pytest.mark.parametrize("text", ["distributed_type: MULTI_GPU", "distributed_type: 'NO'", "[]", "{", ""])
def test_any_other_configuration_of_accelerate_is_no_matter(text: str, tmp_path: Path) -> None:
    (tmp_path / "huggingface" / "accelerate").mkdir(parents=True)
    (tmp_path / "huggingface" / "accelerate" / "default_config.yaml").write_text(text)
    assert sharding_ignored({"XDG_CACHE_HOME": str(tmp_path)}) == []


@pytest.mark.parametrize(
    ("given", "release", "found"),
    [
        ({}, "6.1.0-13-amd64", {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({}, "5.15.153.1-microsoft-standard-WSL2", {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": ""}, "6.1.0", {"PYTORCH_CUDA_ALLOC_CONF": ""}),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "6.1.0", {"PYTORCH_ALLOC_CONF": "backend:native"}),
    ],
)
def test_segments_grow_unless_the_user_or_the_system_has_it_otherwise(given: dict, release: str, found: dict) -> None:
    grow_segments(given, release)
    assert given == found
