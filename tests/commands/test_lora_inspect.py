"""`sd3tune lora inspect`: what is said of good files and of bad ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sd3tune.adapter.file import write_adapter
from sd3tune.adapter.rearrange import arrange
from sd3tune.cli.main import run
from sd3tune.commands.lora_inspect import inspect_lora
from sd3tune.errors import AdapterError

QUERY, MLP = "transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"
CONTRACT = {
    "base": "tiny", "base_kind": "tiny", "base_fingerprint": "0123456789abcdef", "trigger": "sks", "method": "lora",
    "max_sequence_length": 16,
}  # fmt: skip


def factors(up: float = 0.5) -> dict[str, tuple[Tensor, Tensor]]:
    """Norms of BA: 4 x 64 x 0.5 = 128 in block 0, with r = 4; 2 x sqrt(256 * 64) x 0.5 = 128 in block 1."""
    return {
        QUERY: (torch.ones(4, 64), torch.full((64, 4), up)),
        MLP: (torch.ones(2, 256), torch.full((64, 2), up)),
    }


def said(lines: list[str], about: str) -> list[str]:
    """The lines of a section, without its name."""
    start = next(number for number, line in enumerate(lines) if line.startswith(about))
    more = next((number for number, line in enumerate(lines[start + 1 :], start + 1) if line[0] != " "), len(lines))
    return [line[10:] for line in lines[start:more]]


def test_a_file_of_ours_in_words(tmp_path: Path) -> None:
    flat = {f"{name}.lora_{letter}": pair["AB".index(letter)] for name, pair in factors().items() for letter in "AB"}
    write_adapter(tmp_path, flat, CONTRACT)
    lines = inspect_lora(tmp_path)
    assert lines[0] == f"{tmp_path / 'pytorch_lora_weights.safetensors'}: a LoRA in diffusers' layout"
    assert said(lines, "base") == ["tiny (tiny, weights 0123456789ab)"]
    assert said(lines, "modules") == ["2, 1,152 parameters, float32"]
    assert said(lines, "rank") == ["4 (1 modules), 2 (1 modules)"]
    assert said(lines, "scale") == ["1"]
    assert said(lines, "trained") == ["attn.to_q in 1 place", "ff.net.2 in 1 place"]
    assert said(lines, "trigger") == ["sks"]
    assert said(lines, "settings") == ["max_sequence_length: 16", "method: lora"]
    assert said(lines, "|BA|") == ["block 0: 128", "block 1: 128"]
    assert not [line for line in lines if line.startswith("warning")]


@pytest.mark.parametrize(("layout", "name"), [("kohya", "kohya"), ("comfyui", "ComfyUI")])
def test_another_tools_file_says_the_same_norms_and_what_its_metadata_says(
    layout: str, name: str, tmp_path: Path
) -> None:
    file = tmp_path / "dog.safetensors"
    metadata = {"ss_output_name": "dog", "modelspec.trigger_phrase": "sks\nerror: none"}
    save_file(arrange(factors(), layout), file, metadata)
    lines = inspect_lora(file)
    assert lines[0] == f"{file}: a LoRA in {name}'s layout"
    assert said(lines, "base") == ["not stated; its sizes fit none of the released bases"]
    assert said(lines, "trigger") == [r"'sks\nerror: none'"]
    assert said(lines, "name") == ["dog, according to the tool that wrote it"]
    assert said(lines, "settings") == ["none: another tool wrote it, and `infer` needs --base"]
    assert said(lines, "|BA|") == ["block 0: 128", "block 1: 128"]


@pytest.mark.parametrize(
    ("module", "width", "fits"),
    [
        ("transformer_blocks.0.attn.to_q", 1536, "sd3-medium or sd35-medium"),
        ("transformer_blocks.3.attn2.to_q", 1536, "sd35-medium"),
        ("transformer_blocks.37.attn.to_q", 2432, "sd35-large"),
        ("transformer_blocks.38.attn.to_q", 2432, "none of the released bases"),
    ],
)
def test_the_sizes_tell_the_base(module: str, width: int, fits: str, tmp_path: Path) -> None:
    file = tmp_path / "dog.safetensors"
    save_file(arrange({module: (torch.ones(1, width), torch.ones(width, 1))}, "diffusers"), file)
    assert said(inspect_lora(file), "base") == [f"not stated; its sizes fit {fits}"]


def test_what_is_wrong_with_a_file_is_said_and_the_rest_described(tmp_path: Path) -> None:
    file = tmp_path / "dog.safetensors"
    tensors = arrange(factors(0.0), "kohya")
    tensors["lora_unet_joint_blocks_1_x_block_mlp_fc2.lora_down.weight"][0, 0] = torch.nan
    tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(1, 1)
    tensors["lora_unet_joint_blocks_0_x_block_mlp_fc1.lora_down.weight"] = torch.ones(1, 64)
    save_file(tensors, file)
    assert [line for line in inspect_lora(file) if line.startswith("warning: ")] == [
        "warning: 1 tensor for the text encoders (CLIP-L 1; first: lora_te1_text_model_encoder_layers_0_mlp_fc1."
        "lora_down.weight); the other commands refuse the file without --transformer-only",
        "warning: joint_blocks.0.x_block.mlp.fc1: lora_A and lora_B are not a pair of matrices of one rank",
        "warning: 1 tensors are NaN or infinite: lora_unet_joint_blocks_1_x_block_mlp_fc2.lora_down.weight",
        f"warning: B is zero, so these have no effect: {QUERY} and 1 more (of 2 modules)",
        "warning: `infer` and the other commands refuse this file",
    ]


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "the file holds no tensors"),
        ({"decoder.weight\n": torch.ones(1)}, r"no known layout has a key like 'decoder.weight\n'"),
        ({"unet.down_blocks.0.lora_A.weight": torch.ones(1)}, "is for a Stable Diffusion 1, 2 or XL model"),
        ({"lora_unet_context_embedder.alpha": torch.ones(())}, "context_embedder: lora_A and lora_B are not a pair"),
    ],
)
def test_what_is_no_lora_of_sd3_is_one_line(tensors: dict[str, Tensor], says: str, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError) as caught:
        inspect_lora(tmp_path / "x.safetensors")
    (line,) = caught.value.problems
    assert says in line
    assert line.isprintable()


def test_an_alpha_that_makes_the_weights_infinite_is_a_warning(tmp_path: Path) -> None:
    tensors = {f"{QUERY}.lora_A.weight": torch.ones(2, 64), f"{QUERY}.lora_B.weight": torch.ones(64, 2)}
    save_file({**tensors, f"{QUERY}.alpha": torch.tensor(1e300, dtype=torch.float64)}, tmp_path / "x.safetensors")
    assert inspect_lora(tmp_path / "x.safetensors")[-2:] == [
        f"warning: alpha 1e+300 makes the weights of {QUERY} infinite",
        "warning: `infer` and the other commands refuse this file",
    ]


HEADERS = [
    b"", b"x", b"\xff" * 64, (2**62).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
    *(
        len(text).to_bytes(8, "little") + text
        for text in (
            json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
            for shape, offsets in [([2**40, 2**40], [0, 4]), ([-1], [0, 4]), ([1], [4, 0]), ([1], [0, 2**63]), (1, [0])]
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize("content", HEADERS, ids=range(len(HEADERS)))
def test_malformed_headers_are_one_line_and_exit_code_2(content: bytes, tmp_path: Path, monkeypatch, capsys) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["sd3tune", "lora", "inspect", str(file)])
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {file}: not a readable safetensors file: ")


def test_a_pickle_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(AdapterError, match="pickled files can run any code"):
        inspect_lora(tmp_path / "x.ckpt")


def test_an_alpha_that_no_one_states_is_said_to_be_assumed(tmp_path: Path) -> None:
    save_file(arrange(factors(), "diffusers"), tmp_path / "dog.safetensors")
    assert said(inspect_lora(tmp_path), "alpha") == [
        "4 (1 modules), 2 (1 modules) (no alpha stated, taken as rank)",
    ]
    halves = arrange(factors(), "diffusers") | {f"transformer.{QUERY}.alpha": torch.tensor(2)}
    save_file(halves, tmp_path / "dog.safetensors")
    assert said(inspect_lora(tmp_path), "alpha") == [f"2 (no alpha stated for {MLP}, taken as rank)"]
    assert said(inspect_lora(tmp_path), "scale") == ["0.5 (1 modules), 1 (1 modules)"]


def test_a_folder_of_peft_says_its_own_alpha_and_the_scale(tmp_path: Path) -> None:
    tensors = arrange(factors(), "diffusers")
    weights = {key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}
    save_file(weights, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "rank_pattern": {"ff.net.2": 2}, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    lines = inspect_lora(tmp_path)
    assert lines[0] == f"{tmp_path / 'adapter_model.safetensors'}: a LoRA in PEFT's layout"
    assert said(lines, "alpha") == ["16 (rank-stabilised: scale = alpha / sqrt(rank))"]
    assert said(lines, "scale") == ["8 (1 modules), 11.31 (1 modules)"]
