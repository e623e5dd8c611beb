"""The adapter file: what diffusers makes of it, what is refused when reading, and how it meets a model."""

from __future__ import annotations

import json
import logging
import platform
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd3tune.adapter.attach import attach, match
from sd3tune.adapter.file import Adapter, find_adapter, fold_scale, read_adapter, write_adapter
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer, load_pipeline, load_transformer
from sd3tune.model.lora.layers import lora_layers
from sd3tune.model.lora.targets import select_modules

BASES = ["tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"]
RANK, ALPHA = 4, 6.0  # alpha / rank = 1.5, so that a scale that is lost or applied twice shows
CONTRACT = {"base": "tiny", "rank": RANK, "alpha": ALPHA, "max_sequence_length": 16, "sd3tune_version": "0.0"}
MODULE = "transformer_blocks.0.attn.to_q"


def factors_for(base: str, seed: int = 0, targets: str | list[str] = "attention") -> dict[str, Tensor]:
    """A trained adapter's factors as they are in the master: not folded yet."""
    transformer = empty_transformer(resolve_base(base))
    factors = {}
    for name in select_modules(transformer, targets):
        module = transformer.get_submodule(name)
        source = generator(seed, name)
        factors[f"{name}.lora_A"] = torch.randn(RANK, module.in_features, generator=source) / module.in_features**0.5
        factors[f"{name}.lora_B"] = 0.1 * torch.randn(module.out_features, RANK, generator=source)
    return factors


def folded(factors: dict[str, Tensor], scale: float = ALPHA / RANK) -> dict[str, Tensor]:
    return fold_scale(factors, {name.rpartition(".")[0]: scale for name in factors})


def write(folder: Path, base: str = "tiny", **options) -> Path:
    return write_adapter(folder, folded(factors_for(base, **options)), CONTRACT)


def merged(base: str, factors: dict[str, Tensor], scale: float) -> SD3Transformer2DModel:
    """The base with `scale` BA added to its weights, computed here in float64: what the file must come to."""
    transformer = load_transformer(resolve_base(base), torch.float32)
    for name in [key.removesuffix(".lora_A") for key in factors if key.endswith(".lora_A")]:
        weight = transformer.get_submodule(name).weight
        delta = factors[f"{name}.lora_B"].double() @ factors[f"{name}.lora_A"].double()
        weight.data = (weight.double() + scale * delta).float()
    return transformer


def draw(pipeline: StableDiffusion3Pipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 64, "width": 64, "max_sequence_length": 16, "num_inference_steps": 2}
    return pipeline("a dog", generator=torch.Generator().manual_seed(0), output_type="pt", **options).images


# What diffusers says of every SD3 file that trains no text encoder, its own included.
EXPECTED = "No LoRA keys associated to CLIPTextModelWithProjection found"


@contextmanager
def no_complaints(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails when a library warns or logs a warning in the meantime."""
    diffusers = logging.getLogger("diffusers")
    verbosity, propagates = diffusers.level, diffusers.propagate
    diffusers.setLevel(logging.WARNING)
    diffusers.propagate = True
    try:
        with warnings.catch_warnings(record=True) as caught, caplog.at_level(logging.WARNING):
            warnings.simplefilter("always")
            caplog.clear()
            yield
    finally:
        diffusers.setLevel(verbosity)
        diffusers.propagate = propagates
    logged = [record.getMessage() for record in caplog.records]
    assert [message for message in logged if not message.startswith(EXPECTED)] == []
    assert [str(one.message) for one in caught if not issubclass(one.category, DeprecationWarning)] == []


@pytest.mark.parametrize("base", BASES)
def test_a_plain_pipeline_loads_every_key_without_a_word(velocity, base: str, tmp_path: Path, caplog) -> None:
    factors = factors_for(base)
    file = write_adapter(tmp_path, folded(factors), CONTRACT)
    pipeline = load_pipeline(resolve_base(base), torch.float32)
    before = draw(pipeline)
    with no_complaints(caplog):
        pipeline.load_lora_weights(tmp_path)

    layers = lora_layers(pipeline.transformer)
    assert list(layers) == select_modules(empty_transformer(resolve_base(base)), "attention")
    stored = load_file(file)
    assert len(stored) == 2 * len(layers)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default_0"].weight, stored[f"transformer.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B["default_0"].weight, stored[f"transformer.{name}.lora_B.weight"])
        assert layer.scaling["default_0"] == 1.0
    assert (draw(pipeline) - before).abs().mean() > 0.01
    torch.testing.assert_close(
        velocity(pipeline.transformer), velocity(merged(base, factors, ALPHA / RANK)), rtol=0, atol=2e-5
    )


@pytest.mark.parametrize("base", BASES)
def test_attaching_computes_the_same_as_merging_by_hand(velocity, base: str, tmp_path: Path, caplog) -> None:
    factors = factors_for(base)
    transformer = load_transformer(resolve_base(base), torch.float32)
    before = velocity(transformer)
    adapter = read_adapter(write_adapter(tmp_path, folded(factors), CONTRACT))
    with no_complaints(caplog):
        counted = attach(transformer, adapter, "default")
    assert counted.matched == len(factors)
    assert counted.unmatched == ()
    expected = velocity(merged(base, factors, ALPHA / RANK))
    torch.testing.assert_close(velocity(transformer), expected, rtol=0, atol=2e-5)
    assert (expected - before).abs().mean() > 0.05


def test_a_loader_that_ignores_alpha_computes_the_same(velocity, tmp_path: Path) -> None:
    """The file alone, with neither metadata nor our reader: W + BA is the base with alpha / r BA of the master."""
    factors = factors_for("tiny")
    stored = load_file(write_adapter(tmp_path, folded(factors), CONTRACT))
    plain = {key.removeprefix("transformer.").removesuffix(".weight"): value for key, value in stored.items()}
    torch.testing.assert_close(
        velocity(merged("tiny", plain, 1.0)), velocity(merged("tiny", factors, ALPHA / RANK)), rtol=0, atol=2e-5
    )
    assert {value.dtype for value in stored.values()} == {torch.float32}


def test_the_metadata_states_the_layers_and_the_contract(tmp_path: Path) -> None:
    with safe_open(write(tmp_path), framework="pt") as file:
        metadata = file.metadata()
    assert set(metadata) - {key for key in metadata if key.startswith(("modelspec.", "ss_", "trained_"))} == {
        "format", "lora_adapter_metadata", "sd3tune",
    }  # fmt: skip
    peft = json.loads(metadata["lora_adapter_metadata"])
    assert peft["transformer.r"] == peft["transformer.lora_alpha"] == RANK
    assert len(peft["transformer.target_modules"]) == 38
    assert not any("exclude" in key for key in peft)  # diffusers warns about those
    assert json.loads(metadata["sd3tune"]) == {"contract_version": 1, **CONTRACT}


def test_the_metadata_holds_no_path_host_or_time(tmp_path: Path, monkeypatch) -> None:
    for module, name in ((platform, "node"), (socket, "gethostname"), (socket, "getfqdn")):
        monkeypatch.setattr(module, name, lambda *_: "a-host-of-this-name")
    texts = []
    for folder in ("one", "other"):
        with safe_open(write(tmp_path / folder), framework="pt") as file:
            texts.append(file.metadata())
    assert texts[0] == texts[1]
    assert str(tmp_path) not in json.dumps(texts)
    assert "a-host-of-this-name" not in json.dumps(texts)


def test_low_precision_factors_are_written_in_fp32_and_views_of_one_buffer_are_fine(tmp_path: Path) -> None:
    buffer = torch.arange(96, dtype=torch.bfloat16)
    factors = {f"{MODULE}.lora_A": buffer[:32].view(2, 16), f"{MODULE}.lora_B": buffer[32:].view(32, 2).t().t()}
    stored = load_file(write_adapter(tmp_path, factors, {}))
    assert {value.dtype for value in stored.values()} == {torch.float32}
    assert stored[f"transformer.{MODULE}.lora_B.weight"][0].tolist() == [32.0, 33.0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_are_refused_and_nothing_is_written(tmp_path: Path, value: float) -> None:
    factors = factors_for("tiny")
    factors[f"{MODULE}.lora_B"][3, 1] = value
    with pytest.raises(AdapterError, match=rf"not written: 1 tensors are NaN or infinite, first .*{MODULE}\.lora_B"):
        write_adapter(tmp_path / "adapter", factors, CONTRACT)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_file_survives_a_refused_one(tmp_path: Path) -> None:
    file = write(tmp_path)
    before = file.read_bytes()
    with pytest.raises(AdapterError):
        write_adapter(tmp_path, {**factors_for("tiny"), f"{MODULE}.lora_B": torch.full((64, RANK), torch.nan)}, {})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_reading_returns_what_was_written(tmp_path: Path) -> None:
    factors = factors_for("tiny")
    file = write_adapter(tmp_path, folded(factors), CONTRACT)
    adapter = read_adapter(tmp_path)
    assert adapter.path == file == tmp_path / "pytorch_lora_weights.safetensors"
    assert adapter.contract == {"contract_version": 1, **CONTRACT}
    assert set(adapter.alphas.values()) == {float(RANK)}
    for name, (down, up) in adapter.factors.items():
        assert torch.equal(down, factors[f"{name}.lora_A"])
        assert torch.equal(up, factors[f"{name}.lora_B"] * (ALPHA / RANK))


# What `--lora` may point at.


@pytest.mark.parametrize("inside", ["", "adapter"])
def test_a_file_an_adapter_folder_a_checkpoint_and_a_run_are_found(inside: str, tmp_path: Path) -> None:
    file = write(tmp_path / "run" / inside)
    assert find_adapter(tmp_path / "run") == file
    assert find_adapter(file) == file


def test_a_folder_with_one_file_of_another_name_will_do(tmp_path: Path) -> None:
    file = write(tmp_path).rename(tmp_path / "dog.safetensors")
    assert find_adapter(tmp_path) == file


def error_of(location: Path) -> str:
    """The one line that reading this gives; it begins with the path."""
    with pytest.raises(AdapterError) as caught:
        read_adapter(location)
    (line,) = caught.value.problems
    assert line.startswith(str(location))
    assert "\n" not in line
    return line


def test_a_folder_with_several_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path).rename(tmp_path / f"{name}.safetensors")
    assert "name one of a.safetensors, b.safetensors" in error_of(tmp_path)


def test_an_empty_folder_and_a_missing_path_are_told_apart(tmp_path: Path) -> None:
    assert "has the run finished?" in error_of(tmp_path)
    assert "no such file or folder" in error_of(tmp_path / "nothing")


def test_a_file_that_is_not_safetensors_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "dog.safetensors"
    for content in (b"", b"hello", b"\xff" * 100, json.dumps({"a": 1}).encode()):
        file.write_bytes(content)
        assert "not a readable safetensors file" in error_of(file)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path)
    whole = file.read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 20):
        file.write_bytes(whole[:length])
        assert "not a readable safetensors file" in error_of(file)


@pytest.mark.parametrize("name", ["dog.SAFETENSORS", "dog.SafeTensors"])
def test_the_ending_may_be_in_any_case(name: str, tmp_path: Path) -> None:
    file = write(tmp_path).rename(tmp_path / name)
    assert read_adapter(file).factors.keys() == read_adapter(tmp_path).factors.keys()


@pytest.mark.parametrize("name", ["dog.bin", "dog.pt", "dog"])
def test_a_pickled_file_is_refused_unread(name: str, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "sprung",)

    torch.save({"x": Trap()}, tmp_path / name)
    assert "safetensors only; pickled files can run any code" in error_of(tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def save(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    file = folder / "made.safetensors"
    save_file(tensors, file, metadata=metadata)
    return file


def pair(module: str = f"transformer.{MODULE}", rank: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return {
        f"{module}.lora_A.weight": torch.full((rank, 64), 0.1).to(dtype),
        f"{module}.lora_B.weight": torch.full((64, rank), 0.1).to(dtype),
    }


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "it holds no tensors"),
        (pair("unet.down_blocks.0.attn.to_q"), "unet.down_blocks.0.attn.to_q.lora_A.weight and 1 more is for a Stable"),
        (
            {**pair(), **pair("text_encoder.layers.0.q_proj")},
            "also has 2 tensors for the text encoders (CLIP-L 2; first: text_encoder.layers.0.q_proj.lora_A.weight)",
        ),
        ({"decoder.weight": torch.ones(2, 2)}, "decoder.weight belongs to no module of it in any layout"),
    ],
    ids=["no keys", "unet", "text encoder", "no lora"],
)
def test_other_things_than_a_lora_of_the_transformer_are_refused(
    tensors: dict[str, Tensor], said: str, tmp_path: Path
) -> None:
    line = error_of(save(tmp_path, tensors))
    assert said in line


@pytest.mark.parametrize("letter", ["A", "B"])
def test_half_a_pair_is_refused_by_name(letter: str, tmp_path: Path) -> None:
    tensors = {**pair(), **pair("transformer.proj_out")}
    del tensors[f"transformer.proj_out.lora_{letter}.weight"]
    assert ": proj_out: lora_A and lora_B are not a pair" in error_of(save(tmp_path, tensors))


@pytest.mark.parametrize("shape", [(64, 3), (64,), (64, 2, 1)])
def test_a_and_b_of_different_rank_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {**pair(), f"transformer.{MODULE}.lora_B.weight": torch.ones(shape)}
    assert f": {MODULE}: lora_A and lora_B are not a pair" in error_of(save(tmp_path, tensors))


def test_a_file_with_nan_is_refused(tmp_path: Path) -> None:
    tensors = pair()
    tensors[f"transformer.{MODULE}.lora_B.weight"][0, 0] = torch.nan
    assert f"1 tensors are NaN or infinite, first transformer.{MODULE}.lora_B" in error_of(save(tmp_path, tensors))


@pytest.mark.parametrize("alpha", [1e300, -1e300, 1e39])
def test_an_alpha_that_makes_weights_infinite_is_refused(alpha: float, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": alpha})}
    line = error_of(save(tmp_path, pair(), metadata))
    assert f"alpha {alpha:g} makes the weights of {MODULE} infinite" in line
    tensors = {**pair(), f"transformer.{MODULE}.alpha": torch.tensor(alpha, dtype=torch.float64)}
    assert "infinite" in error_of(save(tmp_path, tensors))


def test_weights_that_the_models_dtype_cannot_hold_are_refused(tmp_path: Path) -> None:
    tensors = pair()
    tensors[f"transformer.{MODULE}.lora_A.weight"][0, 0] = 1e6
    transformer = load_transformer(resolve_base("tiny"), torch.float16)
    with pytest.raises(AdapterError, match=rf"{MODULE}.lora_A.weight is beyond what float16 holds"):
        attach(transformer, read_adapter(save(tmp_path, tensors)), "x")
    assert not lora_layers(transformer)


def test_a_newer_contract_asks_for_an_upgrade(tmp_path: Path) -> None:
    contract = json.dumps({"contract_version": 2, "sd3tune_version": "9.1"})
    assert "written by a newer sd3tune (9.1); upgrade" in error_of(save(tmp_path, pair(), {"sd3tune": contract}))


def test_a_variant_that_would_be_computed_wrongly_is_refused(tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.use_dora": True})}
    assert "use_dora: true is not supported" in error_of(save(tmp_path, pair(), metadata))


@pytest.mark.parametrize("key", ["sd3tune", "lora_adapter_metadata"])
def test_metadata_that_is_not_json_is_refused_by_name(key: str, tmp_path: Path) -> None:
    assert f"its metadata '{key}' is not valid JSON" in error_of(save(tmp_path, pair(), {key: "{"}))


def test_another_tools_file_without_metadata_has_alpha_equal_to_rank(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path, pair(rank=5)))
    assert adapter.alphas == {MODULE: 5.0}
    assert adapter.contract == {}


def test_another_tools_alpha_pattern_is_read_as_peft_reads_it(tmp_path: Path) -> None:
    modules = [f"transformer_blocks.{block}.attn.to_{letter}" for block in (0, 1) for letter in "qk"]
    tensors = {key: value for module in modules for key, value in pair(f"transformer.{module}").items()}
    peft = {"r": 2, "lora_alpha": 8, "alpha_pattern": {"attn.to_k": 4, "transformer_blocks.1.attn.to_q": 1}}
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in peft.items()})}
    alphas = read_adapter(save(tmp_path, tensors, metadata)).alphas
    assert [alphas[module] for module in modules] == [8.0, 4.0, 1.0, 4.0]


def test_alphas_and_ranks_of_another_tools_file_are_applied_module_by_module(velocity, tmp_path: Path) -> None:
    other = "transformer_blocks.1.attn.to_q"
    tensors = {**pair(rank=2), **pair(f"transformer.{other}", rank=3)}
    peft = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {other: 1}}
    file = save(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(peft)})
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    attach(transformer, read_adapter(file), "default")
    plain = {key.removeprefix("transformer.").removesuffix(".weight"): value for key, value in tensors.items()}
    plain[f"{MODULE}.lora_B"] *= 8 / 2
    plain[f"{other}.lora_B"] *= 1 / 3
    expected = merged("tiny", plain, 1.0)
    torch.testing.assert_close(velocity(transformer), velocity(expected), rtol=0, atol=2e-5)


def test_another_tools_rank_stabilised_file_computes_what_it_does_in_peft(velocity, tmp_path: Path) -> None:
    """Written by diffusers from a PEFT adapter with rsLoRA and both patterns, as any script would."""
    config = LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, init_lora_weights=False, target_modules=["attn.to_q", "attn.to_k"],
        rank_pattern={"attn.to_k": 9}, alpha_pattern={r"transformer_blocks.1.attn.to_q": 2},
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = load_transformer(resolve_base("tiny"), torch.float32)
    theirs.add_adapter(config, adapter_name="default")
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(theirs), transformer_lora_adapter_metadata=config.to_dict()
    )
    adapter = read_adapter(tmp_path)
    scales = {name: adapter.alphas[name] / len(down) for name, (down, _) in adapter.factors.items()}
    assert scales["transformer_blocks.0.attn.to_q"] == pytest.approx(6 / 4**0.5)
    assert scales["transformer_blocks.1.attn.to_q"] == pytest.approx(2 / 4**0.5)
    assert scales["transformer_blocks.1.attn.to_k"] == pytest.approx(6 / 9**0.5)
    ours = load_transformer(resolve_base("tiny"), torch.float32)
    attach(ours, adapter, "default")
    torch.testing.assert_close(velocity(ours), velocity(theirs), rtol=0, atol=1e-5)


def of_mixed_ranks(base: str) -> dict[str, Tensor]:
    """Factors for every linear kind, rank 4 for most modules and others for some, `proj_out` among them."""
    transformer = empty_transformer(resolve_base(base))
    factors = {}
    for name in [*select_modules(transformer, "attention+mlp"), "proj_out"]:
        rank = {"proj_out": 3, "ff.net.2": 1}.get(name.removeprefix("transformer_blocks.1."), 5 if ".0." in name else 4)
        module, source = transformer.get_submodule(name), generator(0, name)
        factors[f"{name}.lora_A"] = torch.randn(rank, module.in_features, generator=source) / module.in_features**0.5
        factors[f"{name}.lora_B"] = 0.1 * torch.randn(module.out_features, rank, generator=source)
    return factors


@pytest.mark.parametrize("base", BASES)
def test_ranks_that_differ_load_unchanged_in_a_plain_pipeline(velocity, base: str, tmp_path: Path, caplog) -> None:
    factors = of_mixed_ranks(base)
    file = write_adapter(tmp_path, factors, CONTRACT)
    pipeline = load_pipeline(resolve_base(base), torch.float32)
    with no_complaints(caplog):
        pipeline.load_lora_weights(tmp_path)
    stored, layers = load_file(file), lora_layers(pipeline.transformer)
    assert len(stored) == 2 * len(layers) == len(factors)
    for name, layer in layers.items():
        assert torch.equal(layer.lora_A["default_0"].weight, factors[f"{name}.lora_A"])
        assert layer.r["default_0"] == layer.lora_alpha["default_0"] == len(factors[f"{name}.lora_A"])
        assert layer.scaling["default_0"] == 1.0
    expected = velocity(merged(base, factors, 1.0))
    torch.testing.assert_close(velocity(pipeline.transformer), expected, rtol=0, atol=5e-5)
    attached = load_transformer(resolve_base(base), torch.float32)
    assert attach(attached, read_adapter(tmp_path), "default").matched == len(factors)
    assert torch.equal(velocity(attached), velocity(pipeline.transformer))


def test_equal_ranks_need_no_pattern_in_the_metadata(tmp_path: Path) -> None:
    with safe_open(write(tmp_path), framework="pt") as file:
        assert "pattern" not in file.metadata()["lora_adapter_metadata"]


# How it meets a model.


def test_an_adapter_of_a_larger_base_names_the_module_and_both_sizes(tmp_path: Path) -> None:
    adapter = read_adapter(write(tmp_path, "tiny-sd35-large"))
    with pytest.raises(AdapterError) as caught:
        match(empty_transformer(resolve_base("tiny")), adapter)
    (line,) = caught.value.problems
    assert line == (
        f"{adapter.path}: made for another base: transformer_blocks.0.attn.add_k_proj is 96x96 in the adapter and "
        "64x64 in the model; give the right one with --base"
    )


def test_an_adapter_that_matches_nothing_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path, {**pair("transformer.single_blocks.0.attn.to_q"), **pair("transformer.x")}))
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    with pytest.raises(AdapterError, match=r"none of its 2 modules exists .* \(first: single_blocks\.0\.attn\.to_q\)"):
        attach(transformer, adapter, "default")
    assert lora_layers(transformer) == {}


def test_modules_that_the_base_lacks_are_counted_and_the_others_loaded(velocity, tmp_path: Path) -> None:
    factors = factors_for("tiny")
    adapter = read_adapter(write_adapter(tmp_path, folded(factors), CONTRACT))
    transformer = load_transformer(resolve_base("tiny-sd3"), torch.float32)
    counted = attach(transformer, adapter, "default")
    assert counted.matched == 2 * 30
    assert len(counted.unmatched) == 8
    assert all(".attn2." in name for name in counted.unmatched)
    kept = {name: value for name, value in factors.items() if ".attn2." not in name}
    torch.testing.assert_close(
        velocity(transformer), velocity(merged("tiny-sd3", kept, ALPHA / RANK)), rtol=0, atol=2e-5
    )


def test_a_second_adapter_is_matched_and_adds_up_with_its_weight(velocity, tmp_path: Path, caplog) -> None:
    one, other = factors_for("tiny", seed=1), factors_for("tiny", seed=2, targets=["attn.to_q", "ff.net.2"])
    adapters = [
        read_adapter(write_adapter(tmp_path / name, folded(factors), CONTRACT))
        for name, factors in (("one", one), ("other", other))
    ]
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    with no_complaints(caplog):
        assert attach(transformer, adapters[0], "one").unmatched == ()
        assert attach(transformer, adapters[1], "other").matched == len(other)
    transformer.set_adapters(["one", "other"], [1.0, 0.5])

    expected = merged("tiny", one, ALPHA / RANK)
    change = merged("tiny", other, 0.5 * ALPHA / RANK)
    base = load_transformer(resolve_base("tiny"), torch.float32)
    for name in {key.rpartition(".")[0] for key in other}:
        weight = expected.get_submodule(name).weight
        weight.data += change.get_submodule(name).weight - base.get_submodule(name).weight
    torch.testing.assert_close(velocity(transformer), velocity(expected), rtol=0, atol=5e-5)


def test_factors_take_the_models_dtype(velocity, tmp_path: Path) -> None:
    """fp32 factors on a bf16 base would be another sum than the preview's, and cast activations up."""
    adapter: Adapter = read_adapter(write(tmp_path))
    transformer = load_transformer(resolve_base("tiny"), torch.bfloat16)
    attach(transformer, adapter, "default")
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.bfloat16}
    for name, layer in lora_layers(transformer).items():
        assert torch.equal(layer.lora_A["default"].weight, adapter.factors[name][0].to(torch.bfloat16))
    assert velocity(transformer).isfinite().all()


def test_a_file_in_eight_bits_is_read(tmp_path: Path) -> None:
    adapter = read_adapter(save(tmp_path, pair(dtype=torch.float8_e4m3fn)))
    assert attach(load_transformer(resolve_base("tiny"), torch.float32), adapter, "default").matched == 2
