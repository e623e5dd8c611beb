"""What may go wrong in the middle of a run: gradients that are not finite, and too little memory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd3tune.commands.cache import run_cache
from sd3tune.commands.train import run_training
from sd3tune.config import dump_config
from sd3tune.errors import RunError
from sd3tune.methods import LoraMethod
from sd3tune.run.encoding import encode
from sd3tune.run.knobs import encoding_knob, loading_knob, training_knob
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.out_of_memory import is_out_of_memory
from sd3tune.runtime.processes import ALONE


@pytest.fixture
def with_a_broken_image(quick_config, tmp_path: Path):
    """A configuration whose store holds NaN for one image, 2.png, with the overrides given."""

    def make(*overrides: str):
        config = quick_config(tmp_path / "run", f"data.cache_dir={tmp_path / 'store'}", *overrides)
        run_cache(config)
        encoded = encode(make_plan(config, torch.device("cpu"), resume=None), ALONE, lambda line: None)
        (broken,) = (example.images[0] for example in encoded.examples if example.name == "2.png")
        for shard in (tmp_path / "store").glob("shard-*"):
            tensors = load_file(shard)
            if f"{broken}/mean" in tensors:
                tensors[f"{broken}/mean"] = torch.full_like(tensors[f"{broken}/mean"], torch.nan)
                save_file({name: tensor.clone() for name, tensor in tensors.items()}, shard)
        return config

    return make


def test_a_broken_image_is_named_and_its_steps_are_skipped(
    with_a_broken_image, tmp_path: Path, lines_of, capfd, adapter_of
) -> None:
    run_training(with_a_broken_image("train.steps=10"))
    skipped = [line for line in lines_of(tmp_path / "run") if line["grad_norm"] is None]
    assert len(skipped) == 2  # ten steps of five images
    printed = capfd.readouterr().out
    for line in skipped:
        (suspect,) = line["suspects"]
        assert suspect.startswith("2.png at sigma 0.")
        assert f"step {line['step']} was skipped, its gradient is not finite: {suspect}" in printed
    assert all(tensor.isfinite().all() for tensor in adapter_of(tmp_path / "run").values())
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["skipped_steps"] == [line["step"] for line in skipped]


def test_only_the_broken_sample_of_a_batch_is_named(with_a_broken_image, tmp_path: Path, lines_of) -> None:
    run_training(
        with_a_broken_image(
            "train.steps=5", "train.batch_size=2", "train.gradient_accumulation=2", "data.buckets=false"
        )
    )
    lines = lines_of(tmp_path / "run")
    assert any(line["grad_norm"] is None for line in lines)
    for line in lines:
        assert all(suspect.startswith("2.png at sigma") for suspect in line.get("suspects", []))


def test_a_run_of_nothing_but_skipped_steps_stops_and_keeps_the_last_good_state(
    quick_config, tmp_path: Path, lines_of
) -> None:
    """After one step with this learning rate no product is finite."""
    config = quick_config(
        tmp_path, "optimizer.lr=1e18", "train.steps=50", "train.max_skipped=3", "checkpoint={every: 1, keep: 1}"
    )
    with pytest.raises(RunError, match=r"stopped at step 4: no finite gradient 3 times in a row, last for \d\.png at"):
        run_training(config)
    lines = lines_of(tmp_path)
    assert [line["grad_norm"] is None for line in lines] == [False, True, True, True]
    good, last = (load_file(tmp_path / "checkpoints" / f"step-{step:06d}" / "state.safetensors") for step in (3, 4))
    assert torch.equal(good["master"], last["master"])
    with pytest.raises(RunError, match="stopped at step 5: no finite gradient 4 times in a row"):
        run_training(config, resume=True)  # it is still no use


_SHORT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from sd3tune.config import load_config
from sd3tune.errors import UserError
from sd3tune.commands.train import run_training

def tighten(view):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 64 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

try:
    run_training(load_config(sys.argv[1]).config, callbacks=[tighten])
except UserError as error:
    sys.exit(str(error.problems))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the process's size is read from /proc")
def test_running_out_of_memory_is_answered_with_the_next_knob(quick_config, tmp_path: Path, start_cli) -> None:
    """A real limit, set before the first step, below what it takes."""
    file, script = tmp_path / "c.yaml", tmp_path / "short.py"
    settings = ("data.resolution=512", "train.batch_size=24", "train.steps=1")
    file.write_text(dump_config(quick_config(tmp_path / "run", *settings)))
    script.write_text(_SHORT_OF_MEMORY)
    process = start_cli(script, file, prefix=[sys.executable])
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "out of memory while training: set train.batch_size=12 and train.gradient_accumulation=2" in errors
    assert "Traceback" not in errors


def test_the_knobs_come_in_the_order_of_their_cost(quick_config, tmp_path: Path) -> None:
    seen, overrides = [], ["data.resolution=1024", "train.batch_size=6"]
    while not seen or "smaller base" not in seen[-1]:
        config = quick_config(tmp_path, *overrides)
        seen.append(training_knob(config, LoraMethod(config), blocks=4))
        overrides += [part.strip(":") for part in seen[-1].split() if "=" in part]
    assert [knob.split()[1].split("=")[0] for knob in seen[:-1]] == [
        "train.batch_size", "train.batch_size", "train.gradient_checkpointing", "train.gradient_checkpointing",
        "train.swap_blocks", "train.swap_blocks", "model.quantize", "data.resolution", "data.resolution",
    ]  # fmt: skip
    assert (config.train.batch_size, config.train.gradient_accumulation) == (1, 6)
    last = quick_config(
        tmp_path,
        "method.targets=attention+mlp",
        "train.gradient_checkpointing=block",
        "train.swap_blocks=4",
        "model.quantize=int8",
    )
    assert "method.targets=attention" in training_knob(last, LoraMethod(last), blocks=4)
    assert "model.t5_quantize=int8" in encoding_knob(config)
    assert "model.t5_device=cpu" in encoding_knob(quick_config(tmp_path, "model.t5_quantize=int8"))
    assert "model.t5=false" in encoding_knob(quick_config(tmp_path, "model.t5_device=cpu"))
    assert "data.cache_dir" in encoding_knob(quick_config(tmp_path, "model.t5=false"))
    assert "train.swap_blocks=12" in loading_knob(quick_config(tmp_path), blocks=24)
    assert "train.swap_blocks=24" in loading_knob(quick_config(tmp_path, "train.swap_blocks=12"), blocks=24)
    assert "model.quantize=nf4" in loading_knob(quick_config(tmp_path, "train.swap_blocks=24"), blocks=24)
    assert "smaller base" in loading_knob(config, blocks=4)


def test_other_errors_are_not_taken_for_it() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert is_out_of_memory(refused.value)
