"""Full training: what it trains, what its files compute, and that the base stays as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError, ModelError, RunError
from sd3tune.methods import METHODS, FullMethod, full
from sd3tune.model.base.base import Base
from sd3tune.model.base.resolve import configured_base, resolve_base
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.load.components import empty_transformer, load_transformer
from sd3tune.training.flat_master import FlatMaster

CONTRACT = {"base": "tiny", "max_sequence_length": 16, "encoders": ["clip_l", "clip_g", "t5"]}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture
def make(quick_config, tmp_path):
    """`make("key=value", ...)`: the method of that configuration, by default a full fine-tune of `tiny`."""

    def method(*overrides: str) -> FullMethod:
        config = quick_config(tmp_path / "run", "method={kind: full}", *overrides)
        made = METHODS["full"](config, configured_base(config.model, config.seed))
        assert isinstance(made, FullMethod)
        return made

    return method


def injected(method: FullMethod, dtype: torch.dtype = torch.float32) -> tuple[SD3Transformer2DModel, FlatMaster]:
    transformer = load_transformer(method.base, dtype)
    return transformer, FlatMaster(method.inject(transformer, lambda name: generator(0, name)), dtype)


def changed(master: FlatMaster) -> dict[str, Tensor]:
    """Weights as an average might have them: near the live ones, and none of them a number that fp16 has."""
    noise = torch.randn(master.master.shape, generator=generator(1))
    return master.named(master.master.detach() + 0.01 * noise)


def test_all_parameters_are_trained_and_no_buffer(make) -> None:
    method = make()
    transformer, master = injected(method)
    assert list(master.shapes) == [name for name, _ in transformer.named_parameters()]
    assert all(parameter.requires_grad for parameter in transformer.parameters())
    assert not any(buffer.requires_grad for buffer in transformer.buffers())
    skeleton = empty_transformer(method.base)
    assert sum(row.parameters for row in method.coverage(skeleton)) == master.master.numel()
    owners = {name.rpartition(".")[0] for name in master.shapes}
    assert set(method.select(skeleton)) == owners


def test_only_the_blocks_that_are_named_are_trained(make, velocity, tmp_path: Path) -> None:
    method = make("method.blocks=[0, 2-3]")
    transformer, master = injected(method, torch.bfloat16)
    inside = [name for name, _ in transformer.named_parameters() if name.split(".")[1] in ("0", "2", "3")]
    inside = [name for name in inside if name.startswith("transformer_blocks.")]
    assert list(master.shapes) == inside
    assert [name for name, parameter in transformer.named_parameters() if parameter.requires_grad] == inside
    skeleton = empty_transformer(method.base)
    assert set(method.select(skeleton)) == {name.rpartition(".")[0] for name in inside}
    rows = method.coverage(skeleton)
    assert sum(row.parameters for row in rows) == master.master.numel()
    assert {(row.trained, row.present) for row in rows if row.module == "attn"} == {(3, 4)}
    base = load_transformer(method.base, torch.float32).state_dict()
    weights = changed(master)
    with torch.no_grad(), method.as_exported(transformer, weights):
        seen = velocity(transformer)
    method.export(tmp_path / "model", weights, CONTRACT)
    stored = load_transformer(resolve_base(str(tmp_path / "model")), torch.float32).state_dict()
    assert stored.keys() == base.keys()
    for name, value in stored.items():
        assert torch.equal(value, weights.get(name, base[name]).half().float()), name
    assert torch.equal(velocity(load_transformer(resolve_base(str(tmp_path / "model")), torch.bfloat16)), seen)
    assert list(method.block_changes(transformer, weights)) == ["block 0", "block 2", "block 3"]
    with torch.no_grad(), method.disabled(transformer):
        assert torch.equal(velocity(transformer), velocity(load_transformer(method.base, torch.bfloat16)))
    assert method.contract()["blocks"] == [0, "2-3"]
    assert method.identity()["blocks"] == [0, "2-3"]


def test_a_block_that_does_not_exist_is_refused(make) -> None:
    method = make("method.blocks=[9]")
    with pytest.raises(AdapterError, match=r"method\.blocks: 9 is out of range; this base has 4 blocks, 0 to 3"):
        method.select(empty_transformer(method.base))


@pytest.mark.parametrize("random", [False, True])
def test_the_master_begins_with_the_exact_weights_whatever_is_computed_in(make, random: bool) -> None:
    method = make(*(["model.init=random"] if random else []))
    exact = dict(load_transformer(method.base, torch.float32).named_parameters())
    transformer, master = injected(method, torch.bfloat16)
    for name, value in master.named(master.master).items():
        assert torch.equal(value, exact[name])
        assert torch.equal(transformer.get_parameter(name), exact[name].bfloat16())
    assert {tensor.dtype for tensor in transformer.state_dict().values()} == {torch.bfloat16}


@pytest.mark.parametrize("exported", DTYPES)
@pytest.mark.parametrize("computed", DTYPES)
def test_what_is_exported_is_computed_to_the_bit(make, velocity, tmp_path, exported: str, computed: str) -> None:
    method = make(f"method.export_dtype={exported}")
    transformer, master = injected(method, DTYPES[computed])
    use_fast_path(transformer)
    weights = changed(master)
    with torch.no_grad(), method.as_exported(transformer, weights):
        seen = velocity(transformer)
    method.export(tmp_path / "model", weights, CONTRACT)
    loaded = load_transformer(resolve_base(str(tmp_path / "model")), DTYPES[computed])
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = (
            tensor.data.clone()
        )  # a file's tensors begin anywhere, and some CPUs' kernels then round otherwise
    assert torch.equal(velocity(loaded), seen)
    stored = load_transformer(resolve_base(str(tmp_path / "model")), torch.float32).state_dict()
    assert all(torch.equal(stored[name], value.to(DTYPES[exported]).float()) for name, value in weights.items())


@pytest.mark.parametrize("random", [False, True])
def test_without_training_it_is_the_base(make, velocity, random: bool) -> None:
    method = make(*(["model.init=random", "seed=4"] if random else []))
    transformer, master = injected(method, torch.bfloat16)
    use_fast_path(transformer)
    master.master.data.add_(0.1)
    master.publish()
    with torch.no_grad(), method.disabled(transformer):
        seen = velocity(transformer)
    assert torch.equal(seen, velocity(load_transformer(method.base, torch.bfloat16)))


@pytest.mark.parametrize("context", ["as_exported", "disabled"])
def test_the_live_weights_rest_meanwhile_and_come_back(make, velocity, context: str) -> None:
    method = make()
    transformer, master = injected(method)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in transformer.state_dict().items()}
    weights = changed(master)
    other = method.disabled(transformer) if context == "disabled" else method.as_exported(transformer, weights)
    with pytest.raises(KeyboardInterrupt), other:  # whatever ends it
        raise KeyboardInterrupt
    for name, tensor in transformer.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    master.publish()  # which would find that they had moved


def test_weights_that_are_exported_as_they_are_are_not_copied(make) -> None:
    method = make("method.export_dtype=fp32")
    transformer, master = injected(method)
    weights = master.named(master.master.detach().clone())
    with method.as_exported(transformer, weights):
        assert all(p.data_ptr() == weights[name].data_ptr() for name, p in transformer.named_parameters())


def test_the_base_is_kept_only_where_each_step_wants_it(make, monkeypatch) -> None:
    loaded: list[Base] = []
    genuine = full.load_transformer
    monkeypatch.setattr(full, "load_transformer", lambda base, *more: (loaded.append(base), genuine(base, *more))[1])
    prior = "data.sources.0.prior={kind: prediction, prompt: a dog"
    for overrides, times in (((), 3), ((prior + "}",), 1), ((prior + ", weight: 0.0}",), 3)):
        method = make(*overrides)
        transformer, _ = injected(method)
        loaded.clear()
        for _ in range(3):
            with method.disabled(transformer):
                pass
        assert len(loaded) == times


def test_changes_are_relative_to_the_weights_of_the_block(make) -> None:
    method = make()
    transformer, master = injected(method)
    names = ("elsewhere", *(f"block {number}" for number in range(4)))
    start = master.named(master.master)
    assert method.block_changes(transformer, start) == dict.fromkeys(names, 0.0)
    scaled = {name: value * (1.25 if "blocks.2." in name else 1) for name, value in start.items()}
    expected = dict.fromkeys(names, 0.0) | {"block 2": 0.25}
    assert method.block_changes(transformer, scaled) == pytest.approx(expected)


def test_weights_that_a_dtype_cannot_hold_are_not_written(make, tmp_path: Path) -> None:
    method = make()
    _, master = injected(method)
    weights = {**master.named(master.master), "proj_out.bias": torch.full((64,), 1e6)}
    with pytest.raises(RunError, match=r"1 tensors are NaN or infinite as float16, first proj_out\.bias; method"):
        method.export(tmp_path / "model", weights, CONTRACT)
    assert list(tmp_path.iterdir()) == []
    wide = make("method.export_dtype=bf16")
    injected(wide)
    wide.export(tmp_path / "model", weights, CONTRACT)


def test_a_base_whose_parts_are_no_folders_is_refused_before_anything_is_loaded(make, single_file) -> None:
    file = single_file("tiny")
    encoders = f"{{clip_l: {file.parent}/clip_l.safetensors}}"
    tokenizers = "model.tokenizers=tiny"
    for overrides in ([f"model.base={file}", tokenizers], ["model.base=tiny", f"model.text_encoders={encoders}"]):
        method = make(*overrides)
        with pytest.raises(ModelError, match=r"method\.kind=full writes a whole model .* cannot be copied into one"):
            method.select(empty_transformer(method.base))


@pytest.mark.parametrize(
    ("shift", "sampled"), [("model", None), ("resolution", None), ("3.0", None), ("1.5", 1.5), ("3", None), ("2", 2.0)]
)
def test_a_shift_of_its_own_is_sampled_with_and_the_bases_is_left_alone(make, shift: str, sampled) -> None:
    assert make(f"flow.shift={shift}").sampling_shift() == sampled


def test_it_states_what_it_did(make) -> None:
    assert make().contract() == {"method": "full", "init": "pretrained", "export_dtype": "fp16"}
    assert make("model.init=random").contract()["init"] == "random"
    assert make("method.export_dtype=bf16").identity() == {"kind": "full", "export_dtype": "bf16"}


def test_weights_of_a_gpu_in_16_bits_are_overwritten_and_restored(make, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a preview needs no second model there. The CPU stands for the GPU here."""
    monkeypatch.setattr(full, "_can_overwrite", lambda tensor: True)
    method = make("method.export_dtype=bf16")
    transformer, master = injected(method, torch.bfloat16)
    master.master.data.add_(0.25)
    master.publish()
    live = {name: (of.data_ptr(), of.clone()) for name, of in transformer.state_dict().items()}
    base = load_transformer(method.base, torch.bfloat16).state_dict()
    weights = master.named(master.master * 2)
    for context, expected in (
        (method.as_exported(transformer, weights), weights),
        (method.disabled(transformer), base),
    ):
        with context:
            for name, of in transformer.state_dict().items():
                assert of.data_ptr() == live[name][0]
                assert torch.equal(of, expected.get(name, base[name]).to(torch.bfloat16)), name
        for name, of in transformer.state_dict().items():
            assert of.data_ptr() == live[name][0]
            assert torch.equal(of, live[name][1]), name
