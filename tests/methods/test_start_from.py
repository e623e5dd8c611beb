"""Going on from an adapter: the start is what its file computes, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from sd3tune.adapter.attach import attach
from sd3tune.adapter.file import Adapter, read_adapter, write_adapter
from sd3tune.data.sampler import generator
from sd3tune.errors import AdapterError
from sd3tune.methods import LoraMethod
from sd3tune.methods.pivotal import PivotalMethod
from sd3tune.methods.start_from import check_start
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import empty_transformer, load_transformer
from sd3tune.model.lora.targets import select_modules


@pytest.fixture
def make(quick_config, tmp_path):
    return lambda *overrides: LoraMethod(quick_config(tmp_path / "run", *overrides))


def factors(targets: str | list[str] = "attention", rank: int = 2, base: str = "tiny") -> dict[str, Tensor]:
    transformer = empty_transformer(resolve_base(base))
    made = {}
    for name in select_modules(transformer, targets):
        module, source = transformer.get_submodule(name), generator(4, name)
        made[f"{name}.lora_A"] = torch.randn(rank, module.in_features, generator=source) / 8
        made[f"{name}.lora_B"] = torch.randn(module.out_features, rank, generator=source) / 8
    return made


def started(method: LoraMethod) -> tuple[SD3Transformer2DModel, dict[str, Tensor]]:
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    return transformer, method.inject(transformer, lambda name: generator(0, name))


def with_file(file: Path) -> SD3Transformer2DModel:
    transformer = load_transformer(resolve_base("tiny"), torch.float32)
    attach(transformer, read_adapter(file), "default")
    return transformer


@pytest.mark.parametrize(
    "settings", [("method.alpha=2.0",), ("method.alpha=5.0",), ("method.alpha=3.0", "method.rslora=true")]
)
def test_the_first_step_sees_what_the_file_computes(velocity, make, tmp_path: Path, settings: tuple[str, ...]) -> None:
    file = write_adapter(tmp_path / "a", factors(), {})
    method = make(f"method.start_from={tmp_path / 'a'}", *settings)
    transformer, _ = started(method)
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)


def test_exporting_at_once_gives_the_same_factors(make, tmp_path: Path) -> None:
    made = factors()
    write_adapter(tmp_path / "a", made, {})
    method = make(f"method.start_from={tmp_path / 'a'}", "method.alpha=4.0")  # a power of two times the rank: exact
    _, parameters = started(method)
    exported = method.exported(parameters)
    assert exported.keys() == made.keys()
    assert all(torch.equal(exported[name], made[name]) for name in made)


def test_another_tools_scale_is_kept(velocity, make, tmp_path: Path) -> None:
    """alpha 8 at rank 2, in PEFT's metadata."""
    tensors = {f"transformer.{name}.weight": value for name, value in factors().items()}
    file = tmp_path / "other.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": '{"transformer.lora_alpha": 8}'})
    transformer, _ = started(make(f"method.start_from={file}", "method.alpha=3.0"))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-4)


def test_modules_that_the_file_lacks_start_anew(velocity, make, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a", factors("attention-image"), {})
    transformer, parameters = started(make(f"method.start_from={file}", "method.alpha=3.0"))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)
    assert parameters["transformer_blocks.0.attn.add_k_proj.lora_A"].any()
    assert not parameters["transformer_blocks.0.attn.add_k_proj.lora_B"].any()


def test_a_module_that_cannot_learn_may_be_in_the_file(velocity, make, tmp_path: Path) -> None:
    """diffusers' own script trains the last block's add_q_proj, to no effect."""
    dead = "transformer_blocks.3.attn.add_q_proj"
    extra = {f"{dead}.lora_A": torch.ones(2, 64), f"{dead}.lora_B": torch.ones(64, 2)}
    file = write_adapter(tmp_path / "a", {**factors(), **extra}, {})
    transformer, _ = started(make(f"method.start_from={file}"))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)


def test_patterns_may_make_ranks_fit(velocity, make, tmp_path: Path) -> None:
    file = write_adapter(tmp_path / "a", factors(["attn.to_q"]) | factors(["attn.to_k"], rank=5), {})
    overrides = ("method.targets=[attn.to_q, attn.to_k]", "method.rank_pattern={attn.to_k: 5}")
    transformer, _ = started(make(f"method.start_from={file}", *overrides))
    torch.testing.assert_close(velocity(transformer), velocity(with_file(file)), rtol=0, atol=1e-5)


def test_the_contract_records_the_files_content_and_not_its_place(make, tmp_path: Path) -> None:
    one = make(f"method.start_from={write_adapter(tmp_path / 'a', factors(), {})}").contract()
    assert len(one["start_from"]) == 64
    assert str(tmp_path) not in repr(one)


@pytest.mark.parametrize(
    ("made", "overrides", "said"),
    [
        (lambda: factors(rank=4), (),
         "has rank 4 where this run has 2: transformer_blocks.0.attn.add_k_proj and 37 more; set method.rank to 4, or"),
        (lambda: factors(["attn.to_q"]) | factors(["attn.to_k"], rank=3), (),
         "has rank 3 where this run has 2: transformer_blocks.0.attn.to_k and 3 more"),
        (lambda: factors("attention+mlp"), (),
         "also adapts transformer_blocks.0.ff.net.0.proj and 13 more, which method.targets and method.blocks leave"),
        (lambda: factors(["attn.to_q"]), ("method.blocks=[1]",), "also adapts transformer_blocks.0.attn.to_q and 2"),
        (lambda: factors(["transformer_blocks.3.attn.to_q"], base="tiny-sd35-large"), (),
         "was made for another base: transformer_blocks.3.attn.to_q is 96x96 there and 64x64 in this one"),
        (lambda: factors(["attn.to_q", "transformer_blocks.0.attn2.to_q"]), ("model.base=tiny-sd3",),
         "was made for another base: it adapts transformer_blocks.0.attn2.to_q, which this one lacks"),
        (lambda: {"transformer_blocks.3.attn.add_q_proj.lora_A": torch.ones(2, 64),
                  "transformer_blocks.3.attn.add_q_proj.lora_B": torch.ones(64, 2)}, (),
         "adapts none of the trained modules"),
    ],
    ids=["rank", "one rank", "more modules", "other blocks", "other base", "another architecture", "nothing"],
)  # fmt: skip
def test_what_does_not_fit_is_named_before_anything_is_loaded(make, tmp_path: Path, made, overrides, said: str) -> None:
    file = write_adapter(tmp_path / "a", made(), {})
    method = make(f"method.start_from={file}", *overrides)
    base = "tiny-sd3" if "model.base=tiny-sd3" in overrides else "tiny"
    with pytest.raises(AdapterError) as caught:
        method.select(empty_transformer(resolve_base(base)))
    (line,) = caught.value.problems
    assert line.startswith(f"method.start_from: {file} {said}")


def test_a_missing_file_is_named(make, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"method\.start_from: .*nothing: no such file or folder"):
        make(f"method.start_from={tmp_path / 'nothing'}").select(empty_transformer(resolve_base("tiny")))


def test_a_dora_with_text_encoders_is_merged_with_them(make, tmp_path: Path) -> None:
    made = {name.removesuffix(".lora_A"): (value, factors()[f"{name.removesuffix('A')}B"])
            for name, value in factors().items() if name.endswith(".lora_A")}  # fmt: skip
    magnitudes = {name: torch.ones(len(up)) for name, (_, up) in made.items()}
    text = {"text_encoder.text_model.layer": next(iter(made.values()))}
    adapter = Adapter(tmp_path / "a b.safetensors", made, {}, {}, magnitudes=magnitudes, text_factors=text)
    with pytest.raises(
        AdapterError, match=r"merge it into its base \(`sd3tune lora merge '.*a b.safetensors' --into-base --o"
    ):
        check_start(adapter, empty_transformer(resolve_base("tiny")), {})


def test_pivotal_tuning_goes_on_from_no_text_encoders(quick_config, tmp_path: Path) -> None:
    method = PivotalMethod(quick_config(tmp_path / "run", "method={kind: pivotal}"), resolve_base("tiny"))
    pair = torch.ones(2, 16), torch.ones(16, 2)
    adapter = Adapter(tmp_path / "a.safetensors", {}, {}, {}, text_factors={"text_encoder.text_model.layer": pair})
    with pytest.raises(AdapterError, match=r"also adapts text encoders, .* --transformer-only --to diffusers"):
        method.token.select(adapter)
