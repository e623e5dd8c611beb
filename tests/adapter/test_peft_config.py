"""PEFT's folders: what a saved LoRA adds to the weights is what PEFT itself adds, and what is more is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file

from sd3tune.adapter.file import Adapter, read_adapter
from sd3tune.adapter.layouts import PATCH_EMBEDDER
from sd3tune.adapter.peft_config import PeftConfig, _Peft
from sd3tune.errors import AdapterError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_transformer
from sd3tune.model.lora.layers import lora_layers

QUERY, KEY = "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k"


def saved(folder: Path, **settings: Any) -> PeftModel:
    """A PEFT model of `tiny` with a B that is not zero, saved to the folder as scripts do."""
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "target_modules": ["attn.to_q", "attn.to_k", "ff.net.2"], **settings})
    model = get_peft_model(load_transformer(resolve_base("tiny"), torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 4 and alpha 12. Read only."""
    folder = tmp_path_factory.mktemp("peft")
    saved(folder, lora_alpha=12)
    return folder


@pytest.fixture
def folder(plain_folder: Path, tmp_path: Path) -> Path:
    """A copy of `plain_folder`."""
    return Path(shutil.copytree(plain_folder, tmp_path / "copy"))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": 8},
        {"lora_alpha": 8, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"attn.to_q": 32}},
        {"lora_alpha": 6, "rank_pattern": {"attn.to_k": 7, "transformer_blocks.1.ff.net.2": 2}},
        {
            "lora_alpha": 6,
            "use_rslora": True,
            "rank_pattern": {"to_k": 9},
            "alpha_pattern": {f"^{QUERY}": 2, r".*1\.attn\.to_q": 3, "attn.to_q": 5, "to.k": 1.5},
        },
        {"lora_alpha": 3, "target_modules": ["attn.to_q", PATCH_EMBEDDER], "init_lora_weights": "gaussian"},
    ],
    ids=["alpha", "rsLoRA", "alpha pattern", "rank pattern", "all", "a convolution"],
)
def test_a_saved_folder_adds_what_peft_adds(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = {name: layer.get_delta_weight("default").flatten(1)
                for name, layer in lora_layers(saved(tmp_path, **settings).base_model.model).items()}  # fmt: skip
    adapter = read_adapter(tmp_path)
    assert adapter.layout == "PEFT"
    assert adapter.notes == ()
    found = {name: up @ down for name, (down, up) in adapter.folded().items()}
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert change.norm() > 0.01
        torch.testing.assert_close(found[name], change, rtol=1e-5, atol=1e-7)


def test_the_weights_by_name_and_under_another_name_have_the_configuration_beside_them(folder: Path) -> None:
    assert set(read_adapter(folder / "adapter_model.safetensors").alphas.values()) == {12.0}
    (folder / "adapter_model.safetensors").rename(folder / "dog.SAFETENSORS")
    assert set(read_adapter(folder).alphas.values()) == {12.0}


def test_a_configuration_is_not_taken_for_another_tools_file_beside_it(folder: Path) -> None:
    tensors = {f"transformer.{QUERY}.lora_A.weight": torch.ones(2, 64), f"transformer.{QUERY}.lora_B.weight":
               torch.ones(64, 2)}  # fmt: skip
    save_file(tensors, folder / "other.safetensors")
    assert read_adapter(folder / "other.safetensors").alphas == {QUERY: 2.0}
    assert set(read_adapter(folder).alphas.values()) == {12.0}  # of several, PEFT's own name


def test_without_its_configuration_the_missing_alpha_is_said(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()
    adapter = read_adapter(folder)
    assert set(adapter.alphas.values()) == {4.0}
    assert adapter.notes == (
        "no alpha stated, taken as rank; adapter_config.json, which would state it, is not beside the file",
    )


def changed(folder: Path, **values: Any) -> Adapter:
    config = folder / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **values}))
    return read_adapter(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("modules_to_save", ["proj_out"]),
        ("trainable_token_indices", [3]),
        ("layer_replication", [[0, 2]]),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("peft_type", "LOHA"),
        ("a_key_of_tomorrow", {"scale": 3}),
    ],
)
def test_what_would_change_the_result_is_refused_by_its_name(key: str, value: object, folder: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        changed(folder, **{key: value})
    (line,) = caught.value.problems
    assert line.startswith(f"{folder / 'adapter_config.json'}: {key}: {json.dumps(value)} is not supported, as")


def test_what_concerns_the_training_alone_is_let_through(folder: Path) -> None:
    adapter = changed(
        folder, lora_dropout=0.5, init_lora_weights="eva", revision="main", megatron_core="x", inference_mode=True,
        layers_pattern="blocks", a_key_of_tomorrow=None, task_type="FEATURE_EXTRACTION", exclude_modules=["x"],
    )  # fmt: skip
    assert set(adapter.alphas.values()) == {12.0}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"lora_alpha": "8"}, "lora_alpha: Input should be a valid number"),
        ({"lora_alpha": float("nan")}, "lora_alpha: not a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha: not a finite number"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"r": 5}, f"states rank 5 for {KEY}, whose tensors have rank 4"),
        ({"rank_pattern": {"attn.to_k": 9}}, f"states rank 9 for {KEY}, whose tensors have rank 4"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "alpha_pattern: '(a+)+$' is a regular expression"),
        ({"rank_pattern": {"to_q|to_k": 4}}, "rank_pattern: 'to_q|to_k' is a regular expression"),
        ({"alpha_pattern": {"a" * 10_000: 1}}, "alpha_pattern: 'aaa"),
        ({"alpha_pattern": {"[": 1}}, "alpha_pattern: '[' is a regular expression"),
        ({"alpha_pattern": {f"x{number}": 1 for number in range(1025)}}, "alpha_pattern: Dictionary should have at"),
        ({"alpha_pattern": [1]}, "alpha_pattern: Input should be a valid dictionary"),
    ],
)
def test_values_that_cannot_be_are_one_line(values: dict[str, Any], says: str, folder: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        changed(folder, **values)
    (line,) = caught.value.problems
    assert line.startswith(f"{folder / 'adapter_config.json'}")
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff" * 4, '{"r": ' + "[" * 100_000])
def test_a_configuration_that_is_none_is_one_line(text: str, folder: Path) -> None:
    (folder / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=r"adapter_config\.json") as caught:
        read_adapter(folder)
    assert len(caught.value.problems) == 1


PATTERNS = [
    "to_q", "attn.to_q", "n.to_q", "^attn.to_q", f"^{QUERY}", f"^{QUERY}$", ".*to_q", r".*\.attn\.to_q", "o_q", ".*o_q",
    "^.*attn2.to_q", "attn..to_q", "to.q", r"to\.q", "transformer_blocks.0.attn.to_q", "blocks.0.attn.to_q", ".",
    "ff.net.2",
]  # fmt: skip
MODULES = [
    QUERY, KEY, "transformer_blocks.0.attn2.to_q", "transformer_blocks.10.attn.to_q", "to_q", "ff.net.2", "xff.net.2",
]  # fmt: skip


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_fit_what_they_fit_in_peft(pattern: str) -> None:
    config = PeftConfig(_Peft(alpha_pattern={pattern: 7.0}))
    assert list(config.alphas(dict.fromkeys(MODULES, 4))) == [
        module for module in MODULES if get_pattern_key([pattern], module) == pattern
    ]


def test_the_metadata_of_a_pipeline_speaks_of_the_transformer_by_its_prefix(folder: Path) -> None:
    tensors = {f"transformer.{QUERY}.lora_A.weight": torch.ones(2, 64), f"transformer.{QUERY}.lora_B.weight":
               torch.ones(64, 2)}  # fmt: skip
    for number, (peft, alpha) in enumerate(
        [
            ({"transformer.lora_alpha": 6, "text_encoder.lora_alpha": 1, "text_encoder.use_dora": True}, 6.0),
            ({"lora_alpha": 5, "r": 2}, 5.0),
            ({"text_encoder.lora_alpha": 1}, 2.0),
        ]
    ):
        file = folder / f"{number}.safetensors"
        save_file(tensors, file, {"lora_adapter_metadata": json.dumps(peft)})
        assert read_adapter(file).alphas == {QUERY: alpha}


def test_a_folder_of_peft_holds_the_weights_alone(folder: Path) -> None:
    """What this rests on: neither tensors nor metadata state alpha."""
    assert {key.split(".")[-2] for key in load_file(folder / "adapter_model.safetensors")} == {"lora_A", "lora_B"}


@pytest.mark.parametrize(
    ("key", "value", "runs"),
    [
        ("target_modules", "(.*)*x", True),
        ("exclude_modules", "(a+)+$", True),
        ("layers_pattern", ["(a+)+$"], True),
        ("target_modules", ["attn.to_q"], False),
        ("exclude_modules", None, False),
    ],
)
def test_a_file_whose_expressions_diffusers_would_run_is_not_given_to_it(
    key: str, value: object, runs: bool, tmp_path: Path
) -> None:
    tensors = {
        f"transformer.{QUERY}.lora_A.weight": torch.ones(2, 64),
        f"transformer.{QUERY}.lora_B.weight": torch.ones(64, 2),
    }
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value, "transformer.r": 2})}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    assert read_adapter(tmp_path / "a.safetensors").for_diffusers is not runs
