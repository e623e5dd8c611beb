"""Runs whose processes divide the model, against one process with the same images at a time."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, safe_open

from sd3tune.commands.train import run_training
from sd3tune.config import Config, dump_config
from sd3tune.errors import RunError
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.forecast.sharding import GATHERED
from tests.forks import FORKS
from tests.runtime.sharded_processes import first_gradient, rank

FSDP = "train.sharding=fsdp"
LOOKING = (
    "validation={holdout: 3, every: 4}", "preview={prompts: [a dog], every: 4, steps: 2}",
    "train.gradient_checkpointing=block",
)  # fmt: skip
LORA = ("train.steps=4", "optimizer.lr=1e-3", *LOOKING)
WHOLE = (
    "train.steps=4", "method={kind: full, export_dtype: fp32}", "optimizer.lr=1e-4", "ema={decay: 0.8}",
    "checkpoint={every: 2, keep: 3}",
)  # fmt: skip
Tensors = Mapping[str, torch.Tensor]
LAST = Path("checkpoints", "step-000004")


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., None]:
    """`launch(2, "run", "other:3")`: trains these configurations of the folder (see `sharded_processes`)."""

    def start(processes: int, *runs: str) -> None:
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            port = listening.getsockname()[1]
        environment = dict(os.environ) | {
            "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        started = [
            FORKS.Process(target=rank, args=(number, environment, tmp_path, list(runs))) for number in range(processes)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(600)
        assert [process.exitcode for process in started] == [0] * processes

    return start


@pytest.fixture
def alone(tmp_path: Path) -> Callable[..., Path]:
    """`alone(make_config, "name", ...)`: the run folder of one process, with its first gradient beside it."""

    def train(make, name: str, *overrides: str) -> Path:
        with first_gradient(tmp_path / f"{name}-gradient.safetensors"):
            run_training(make(tmp_path / name, *overrides))
        return tmp_path / name

    return train


def write(make, run: Path, *overrides: str) -> None:
    run.with_suffix(".yaml").write_text(dump_config(make(run, FSDP, *overrides)))


def products_of(run: Path) -> Tensors:
    places = ("adapter", "embedding", "pivotal", "model/transformer")
    files = [file for place in places for file in run.glob(f"{place}/*.safetensors")]
    assert files
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def shards_of(checkpoint: Path) -> Tensors:
    """Return the tensors of a distributed checkpoint, put together by their offsets."""
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for file in sorted(checkpoint.glob("shard-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in places:
                first = (*places[name]["saved_offsets"], 0)[0]
                parts.setdefault(name, []).append((first, opened.get_tensor(name)))
    return {
        name: torch.cat([of for _, of in sorted(found, key=lambda part: part[0])]) if found[0][1].ndim else found[0][1]
        for name, found in parts.items()
    }


def assert_close_runs(sharded: Path, single: Path, lines_of) -> None:
    """The first step's gradients to 1e-6, losses to 1e-5, and the product to 1e-4."""
    gradients = [load_file(run.with_name(f"{run.name}-gradient.safetensors")) for run in (sharded, single)]
    gradient = largest_difference(*gradients)
    losses = [
        abs(two["loss"] / one["loss"] - 1)
        for name in ("metrics.jsonl", *["validation.jsonl"] * (sharded / "validation.jsonl").is_file())
        for two, one in zip(lines_of(sharded, name), lines_of(single, name), strict=True)
    ]
    for two, one in zip(lines_of(sharded), lines_of(single), strict=True):
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    product = largest_difference(products_of(sharded), products_of(single))
    note(sharded.name, gradient, max(losses), product)
    assert gradient <= 1e-6
    assert max(losses) <= 1e-5
    assert product <= 1e-4


def largest_difference(first: Tensors, second: Tensors) -> float:
    assert first.keys() == second.keys()
    assert any(tensor.any() for tensor in second.values())
    return max((first[name] - tensor).abs().max().item() for name, tensor in second.items())


def note(name: str, *values: float) -> None:
    """Add a line to the table of `make scale`."""
    if table := os.environ.get("SD3TUNE_SCALE_TABLE"):
        with Path(table).open("a") as file:
            file.write(f"{name:<20}" + "".join(f"{value:>12.1e}" for value in values) + "\n")


def assert_as_planned(run: Path, config: Config) -> None:
    """Compare the account of two processes' memory with the bytes that they counted and wrote."""
    planned = forecast(forecast_inputs(config, torch.float32, 2)).training
    held = [json.loads(run.with_name(f"{run.name}-{rank}.json").read_text()) for rank in (0, 1)]
    trained = planned.master if config.method.freezes_base else planned.compute
    assert max(of["frozen"] for of in held) == planned.frozen
    assert max(of["trained"] for of in held) == trained
    assert {GATHERED * of["gathered"] for of in held} == {planned.gathered}
    for file in (run / LAST).glob("shard-*.safetensors"):
        tensors = load_file(file)
        for kind, nbytes in (("master.", planned.master), ("ema.", planned.average), ("optimizer.", planned.optimizer)):
            own = sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(kind) and tensor.ndim)
            assert 0.9 * nbytes < own <= nbytes


def test_two_processes_that_divide_the_model_train_as_one(
    quick_config, tmp_path: Path, launch, alone, lines_of
) -> None:
    """A LoRA on a divided base, and a whole model."""
    write(quick_config, tmp_path / "lora", *LORA)
    write(quick_config, tmp_path / "whole", *WHOLE)
    launch(2, "lora", "whole")

    assert_close_runs(tmp_path / "lora", alone(quick_config, "one-lora", *LORA, "train.batch_size=2"), lines_of)
    for picture in ("base-0.png", "step-000004-0.png"):
        assert (tmp_path / "lora" / "samples" / picture).is_file()
    one = alone(quick_config, "one-whole", *WHOLE, "train.batch_size=2")
    assert_close_runs(tmp_path / "whole", one, lines_of)
    assert_as_planned(tmp_path / "lora", quick_config(tmp_path / "lora", FSDP, *LORA))
    assert_as_planned(tmp_path / "whole", quick_config(tmp_path / "whole", FSDP, *WHOLE))


@pytest.mark.long
def test_a_divided_model_that_is_killed_is_resumed_also_by_one_process(
    quick_config, tmp_path: Path, launch, alone
) -> None:
    write(quick_config, tmp_path / "whole", *WHOLE)
    write(quick_config, tmp_path / "killed", *WHOLE)
    launch(2, "whole", "killed:3")
    straight, killed = (shards_of(tmp_path / name / LAST) for name in ("whole", "killed"))
    assert straight.keys() == killed.keys()
    assert all(torch.equal(killed[name], tensor) for name, tensor in straight.items())
    assert all(torch.equal(products_of(tmp_path / "killed")[n], t) for n, t in products_of(tmp_path / "whole").items())

    one = alone(quick_config, "one-whole", *WHOLE, "train.batch_size=2")
    longer = ("train.steps=6", "train.batch_size=2", *WHOLE[1:])
    with pytest.raises(RunError, match="processes: 2 in the run, 1 now; with train"):
        run_training(quick_config(tmp_path / "killed", FSDP, *longer, "train.batch_size=1"), resume=True)
    run_training(quick_config(tmp_path / "killed", FSDP, *longer), resume=True)
    run_training(quick_config(one, *longer), resume=True)
    assert largest_difference(products_of(tmp_path / "killed"), products_of(one)) <= 1e-4


@pytest.mark.long
def test_four_processes_train_as_one_and_go_on_from_any_number(
    quick_config, tmp_path: Path, launch, alone, lines_of
) -> None:
    """The number of processes changes from 2 to 4, and from 1, whose checkpoint is not divided, to 4."""
    write(quick_config, tmp_path / "four-lora", *LORA)
    write(quick_config, tmp_path / "four-whole", *WHOLE, *LOOKING)
    whole = ("train.steps=6", *WHOLE[1:])
    write(quick_config, tmp_path / "from-two", *WHOLE, "train.batch_size=2")
    launch(2, "from-two")
    write(quick_config, tmp_path / "from-two", *whole)
    alone(quick_config, "from-one", FSDP, *WHOLE, "train.batch_size=4")
    write(quick_config, tmp_path / "from-one", *whole)
    launch(4, "four-lora", "four-whole", "from-two:resume", "from-one:resume")

    lora = alone(quick_config, "one-lora", *LORA, "train.batch_size=4")
    assert_close_runs(tmp_path / "four-lora", lora, lines_of)
    looking = alone(quick_config, "one-whole", *WHOLE, *LOOKING, "train.batch_size=4")
    assert_close_runs(tmp_path / "four-whole", looking, lines_of)
    straight = alone(quick_config, "straight", *whole, "train.batch_size=4")
    for name in ("from-two", "from-one"):
        assert json.loads((tmp_path / name / "run.json").read_text())["world_size"] == 4
        change = largest_difference(products_of(tmp_path / name), products_of(straight))
        note(name, change)
        assert change <= 1e-4


TOKEN = "token: <rex>, vectors: 2, init: a dog, t5_caption: dog"
RELATIVES = {
    "dora": ("method={kind: dora, rank: 2}",),
    "loha": ("method={kind: loha, rank: 2}",),
    "lokr": ("method={kind: lokr, rank: 2}",),
    "text": ("method={kind: lora, rank: 2, text_encoders: {clip_l: {}}}",),
    "muon": ("optimizer={kind: muon}", "train.gradient_accumulation=2"),
    "prior": ("data.sources=[{path: PICTURES}, {path: PICTURES, prior: {kind: prediction, prompt: a dog}}]",),
    "plain": ("train.fast_path=false", "train.hoist=false", "train.gradient_checkpointing=selective"),
    "token": (f"method={{kind: textual_inversion, {TOKEN}}}", "data.sources=[{path: NAMED}]"),
    "pivotal": (
        f"method={{kind: pivotal, rank: 2, embedding: {{{TOKEN}, lr: 1e-3}}}}",
        "data.sources=[{path: NAMED}]",
    ),
    "blocks": ("method={kind: full, export_dtype: fp32, blocks: [0, 2]}", "optimizer={kind: lion, lr: 1e-4}"),
}
"""Settings of short runs, each by name."""


@pytest.mark.long
def test_other_methods_train_on_a_divided_base(
    quick_config, tiny_images: Path, write_images, tmp_path: Path, launch, alone, lines_of, monkeypatch
) -> None:
    """With accelerate's request for FSDP in the environment, as `accelerate launch` leaves it."""
    common = ("train.steps=3", "optimizer.lr=1e-3")
    named = write_images(tmp_path / "named", 3)
    for file in named.glob("*.txt"):
        file.write_text("a photo of <rex> outside")
    places = {"PICTURES": str(tiny_images), "NAMED": str(named)}
    runs = {
        name: (*common, *(re.sub("PICTURES|NAMED", lambda word: places[word[0]], setting) for setting in settings))
        for name, settings in RELATIVES.items()
    }
    for name, settings in runs.items():
        write(quick_config, tmp_path / name, *settings)
    eva = (*common, "method={kind: lora, rank: 2, init: eva}")  # begins from a process's own batches
    write(quick_config, tmp_path / "eva", *eva)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    launch(2, *runs, "eva")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    write(quick_config, tmp_path / "eva-whole", *eva, "train.sharding=none")
    launch(2, "eva-whole")
    assert_close_runs(tmp_path / "eva", tmp_path / "eva-whole", lines_of)
    for name, settings in runs.items():
        assert_close_runs(
            tmp_path / name, alone(quick_config, f"one-{name}", *settings, "train.batch_size=2"), lines_of
        )


@pytest.mark.long
def test_a_damaged_or_missing_shard_is_named(quick_config, tmp_path: Path, launch) -> None:
    settings = ("train.steps=2", "checkpoint={every: 2}", WHOLE[1])
    write(quick_config, tmp_path / "run", *settings)
    launch(2, "run")
    longer = quick_config(tmp_path / "run", FSDP, "train.steps=3", *settings[1:], "train.batch_size=2")
    (file, *_) = sorted((tmp_path / "run" / "checkpoints" / "step-000002").glob("shard-*"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + bytes(4))
    with pytest.raises(
        RunError, match=rf"damaged \({file.name}: not the bytes that were written\); delete this folder"
    ):
        run_training(longer, resume=True)
    file.unlink()
    with pytest.raises(RunError, match=rf"damaged .*{file.name}"):
        run_training(longer, resume=True)
    file.write_bytes(whole)
    run_training(longer, resume=True)


@pytest.mark.long
def test_accelerate_s_own_configuration_works_or_is_answered_with_the_line_to_change(
    quick_config, tmp_path: Path, start_cli, monkeypatch
) -> None:
    """As a user types it, with `fsdp` in the default configuration of accelerate."""
    write(quick_config, tmp_path / "run", "train.steps=1")
    defaults = tmp_path / "hf" / "accelerate" / "default_config.yaml"
    defaults.parent.mkdir(parents=True)
    defaults.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nnum_machines: 1\nnum_processes: 2\n"
        "fsdp_config: {fsdp_version: 2, fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP}\n"
    )
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    prefix = (str(Path(sys.executable).with_name("accelerate")), "launch")
    program = ("-m", "sd3tune", "train", tmp_path / "run.yaml")
    process = start_cli(*program, "train.sharding=none", prefix=prefix)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0
    change = f"set train.sharding=fsdp, or write distributed_type: MULTI_GPU in {defaults}"
    assert f"error: ACCELERATE_USE_FSDP=true: train.sharding is none; {change}" in errors
    assert not (tmp_path / "run").exists()
    process = start_cli(*program, prefix=prefix)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert json.loads((tmp_path / "run" / "run.json").read_text())["world_size"] == 2
