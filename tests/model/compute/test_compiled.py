"""Compiled blocks: one graph for each kind of block and image size, and the results of the plain path.

The graphs are computed by torch's own operations here; the code that Inductor writes for them is tested by
`make check-long`.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn
from torch._dynamo.utils import counters

from sd3tune.commands.train import run_training
from sd3tune.data.sampler import generator
from sd3tune.errors import ConfigError, RunError
from sd3tune.model.compute.checkpointing import checkpoint_blocks
from sd3tune.model.compute.compiled import compile_blocks
from sd3tune.model.compute.hoist import compute_ahead, hoist, modulate
from sd3tune.run import state
from sd3tune.run.preflight import make_plan
from sd3tune.run.setup import load_base, make_trainable
from tests.model.compute.test_fast import BASES, adapted_model, error, exact, inputs, run, total_error, whole_model


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def alike(base: str, dtype: torch.dtype) -> SD3Transformer2DModel:
    """A tiny base whose adapters all have one rank and scale, as in most runs; else each has a graph of its own."""
    transformer = adapted_model(base, dtype, ranks=(4,))
    return exact(transformer) if dtype is torch.float64 else transformer


@pytest.mark.parametrize(
    ("base", "checkpointing"),
    [
        ("tiny-sd35-medium", "none"),
        *(
            pytest.param(base, kind, marks=pytest.mark.long)
            for base in BASES
            for kind in ("none", "block")
            if (base, kind) != ("tiny-sd35-medium", "none")
        ),
    ],
)
def test_outputs_and_gradients_are_the_plain_paths(base: str, checkpointing: str) -> None:
    transformer = alike(base, torch.float64)
    velocity, gradients = run(copy.deepcopy(transformer))
    checkpoint_blocks(transformer, checkpointing)
    compile_blocks(transformer, "aot_eager")
    found, found_gradients = run(transformer)
    assert error(found, velocity) < 1e-13
    assert total_error(found_gradients, gradients) < 1e-11
    assert not counters["graph_break"]


@pytest.mark.long
def test_a_whole_model_is_compiled_too() -> None:
    transformer = exact(whole_model("tiny", torch.float64))
    velocity, gradients = run(copy.deepcopy(transformer))
    compile_blocks(transformer, "aot_eager")
    found, found_gradients = run(transformer)
    assert error(found, velocity) < 1e-13
    assert total_error(found_gradients, gradients) < 1e-11


@pytest.mark.long
def test_blocks_of_a_kind_and_steps_of_a_size_share_a_graph() -> None:
    """Also with modulations computed ahead, which are other tensors in each step."""
    transformer = alike("tiny-sd35-large", torch.float32)
    hoist(transformer)
    compile_blocks(transformer, "eager")
    assert len(transformer.transformer_blocks) == 6
    given = inputs(transformer, torch.float32)
    for height in (12, 12, 8, 12, 8):
        modulate(transformer, compute_ahead(transformer, [(given["timestep"], given["pooled_projections"])])[0])
        here = {**given, "hidden_states": given["hidden_states"][:, :, :height]}
        transformer(**here, return_dict=False)[0].sum().backward()
    kinds = 3  # the first block's inputs need no gradient, and the last gives no text
    assert counters["stats"]["unique_graphs"] == 2 * kinds


@pytest.mark.long
@pytest.mark.parametrize(
    ("backend", "checkpointing"), [("eager", "none"), ("aot_eager", "none"), ("aot_eager", "block")]
)
def test_swapped_blocks_give_the_same_in_no_more_graphs(
    quick_config, tmp_path: Path, backend: str, checkpointing: str
) -> None:
    """In two steps: the second finds other weights in the buffers than those that a graph was made with."""

    def computed(*settings: str) -> list[torch.Tensor]:
        checkpointed = f"train.gradient_checkpointing={checkpointing}"
        config = quick_config(tmp_path, "train.fast_path=false", checkpointed, *settings)
        plan = make_plan(config, torch.device("cpu"), resume=None)
        transformer = load_base(plan)
        parameters = make_trainable(config, plan.method, transformer)
        for number, parameter in enumerate(parameters.values()):
            parameter.data.normal_(std=0.1, generator=generator(number))
        if config.train.compile == "blocks":
            compile_blocks(transformer, backend)
        found = []
        for _ in range(2):
            output = transformer(**inputs(transformer, torch.float32)).sample
            output.square().mean().backward()
            found += [output.detach(), *(parameter.grad.clone() for parameter in parameters.values())]
        return found

    plain = computed()
    swapped = computed("train.swap_blocks=4", "train.compile=blocks")
    assert all(map(torch.equal, swapped, plain))
    assert counters["stats"]["unique_graphs"] == 4  # of four blocks, no two are of a kind here


@pytest.mark.long
def test_a_run_trains_as_an_uncompiled_one_and_draws_the_same_way(
    quick_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter_of, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(state, "compile_blocks", partial(compile_blocks, backend="eager"))
    settings = (
        "data.buckets=false",
        "preview.prompts=[a dog]",
        "preview.steps=1",
        "preview.every=2",
        "validation={holdout: 1, every: 2}",
    )
    run_training(quick_config(tmp_path / "plain", *settings, "train.fast_path=false"))
    assert not counters["stats"]
    run_training(quick_config(tmp_path / "compiled", *settings, "train.compile=blocks"))
    assert "compile   blocks: the first step of each image size takes a minute or more" in capsys.readouterr().out
    assert counters["stats"]["unique_graphs"] > 0
    for name, tensor in adapter_of(tmp_path / "plain").items():
        torch.testing.assert_close(adapter_of(tmp_path / "compiled")[name], tensor, rtol=1e-3, atol=1e-5)


def test_a_compiler_that_fails_is_one_line(quick_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(graph: object, examples: object) -> None:
        raise RuntimeError("no working C++ compiler")

    monkeypatch.setattr(state, "compile_blocks", partial(compile_blocks, backend=fails))
    says = r"^train.compile: blocks: .*no working C\+\+ compiler.*; set train.compile: none$"
    with pytest.raises(RunError, match=says):
        run_training(quick_config(tmp_path / "run", "train.compile=blocks"))


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("model.quantize=nf4", "train.compile is blocks and model.quantize is nf4"),
        ("method.dropout=0.1", "train.compile is blocks and method.dropout is not 0"),
        ("train.gradient_checkpointing=selective", "compile is blocks and gradient_checkpointing is selective"),
    ],
)
def test_what_cannot_be_compiled_is_refused(quick_config, tmp_path: Path, other: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        quick_config(tmp_path, "train.compile=blocks", other)


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductors_code_is_as_precise_as_the_plain_path(dtype: torch.dtype) -> None:
    transformer = alike("tiny", torch.float32)
    velocity, gradients = run(copy.deepcopy(transformer), torch.float32)
    transformer = nn.Module.to(transformer, dtype)
    plain, plain_gradients = run(copy.deepcopy(transformer), dtype)
    compile_blocks(transformer)
    found, found_gradients = run(transformer, dtype)
    assert error(found, velocity) < max(1e-5, 1.5 * error(plain, velocity))
    assert total_error(found_gradients, gradients) < max(1e-5, 1.5 * total_error(plain_gradients, gradients))
