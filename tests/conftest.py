"""What tests share: one cache of offline bases and encodings, small pictures, and quick configurations."""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

gc.disable()  # importing the libraries makes a million objects, none of it garbage: a third of the time of a start
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file, save_file

from sd3tune.cli.main import run
from sd3tune.config import Config, parse_config
from sd3tune.data.sampler import generator
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.base.resolve import resolve_base

pytest_plugins = (
    "tests.run_files",
    "tests.drawn_runs",
    "tests.chromium",
    "tests.released_files",
    "tests.nullgpu.fixture",
)

WriteImages = Callable[[Path, int], Path]
MakeConfig = Callable[..., Config]
Tensors = Mapping[str, torch.Tensor]

COLOURS = ("red", "green", "blue", "orange", "purple", "teal", "black", "white")


def pytest_configure() -> None:
    os.environ.pop("HF_HUB_OFFLINE", None)  # read when huggingface_hub is imported, before any fixture runs
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as when activated
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bits are compared, which holds on the CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests come first, so that no process has only these left while the others are done."""
    items.sort(key=lambda item: not item.nodeid.startswith(("tests/run/crash", "tests/nullgpu")))


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for the whole session: pytest-xdist's workers build each offline base once between them."""
    folder = tmp_path_factory.getbasetemp()
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SD3TUNE_CACHE", str(shared / "sd3tune-cache"))
        patch.setenv("HF_DATASETS_CACHE", str(shared / "datasets-cache"))  # read when `datasets` is first imported
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_collections() -> Iterator[None]:
    """What was imported is left out of garbage collections, which encoding and previews run after each component."""
    gc.collect()
    gc.freeze()
    gc.enable()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session")
def write_images() -> WriteImages:
    """Writes small pictures of different colours, sizes and captions into a folder; returns the folder."""

    def write(folder: Path, count: int) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            image = Image.new("RGB", (96 + 8 * number, 80), COLOURS[number])
            ImageDraw.Draw(image).ellipse((8, 8, 40 + 4 * number, 72), fill=COLOURS[number - 1])
            image.save(folder / f"{number}.png")
            (folder / f"{number}.txt").write_text(f"a {COLOURS[number]} picture of sks dog")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory, write_images: WriteImages) -> Path:
    """A folder of five captioned pictures, the same all session, so that they are encoded once. Read only."""
    return write_images(tmp_path_factory.mktemp("pictures"), 5)


@pytest.fixture(scope="session")
def quick_config(tiny_images: Path) -> MakeConfig:
    """`quick_config(run_folder, "train.steps=4", ...)`: the smallest run that takes every path."""

    def make(run: Path, *overrides: str) -> Config:
        values = {
            "name": "quick",
            "output_dir": str(run),
            "model": {"base": "tiny", "max_sequence_length": 16},
            "method": {"kind": "lora", "rank": 2, "alpha": 2.0},
            "data": {"sources": [{"path": str(tiny_images)}], "resolution": 64},
            "flow": {"shift": 1.0},
            "optimizer": {"lr": 1e-2},
            "train": {"steps": 3, "log_every": 1},
        }
        return parse_config(values, overrides).config

    return make


SCRATCH = (
    "model.init=random",
    "model.transformer={num_layers: 2, attention_head_dim: 8, dual_attention_layers: [0]}",
    "method={kind: full}",
)


@pytest.fixture(scope="session")
def scratch_config(quick_config: MakeConfig) -> MakeConfig:
    """`quick_config`, but training a small transformer from scratch."""
    return lambda run, *overrides: quick_config(run, *SCRATCH, *overrides)


@pytest.fixture(scope="session")
def velocity() -> Callable[[SD3Transformer2DModel], torch.Tensor]:
    """`velocity(transformer)`: what a base of the tiny widths makes of a fixed input, in its own dtype."""

    def predict(transformer: SD3Transformer2DModel) -> torch.Tensor:
        source, dtype = generator(5), transformer.dtype
        predicted: torch.Tensor = transformer(
            hidden_states=torch.randn(1, 16, 8, 8, generator=source).to(dtype),
            timestep=torch.tensor([400.0]),
            encoder_hidden_states=torch.randn(1, 93, 64, generator=source).to(dtype),
            pooled_projections=torch.randn(1, 48, generator=source).to(dtype),
        ).sample
        return predicted

    return predict


@pytest.fixture(scope="session")
def original_layout() -> Callable[[Tensors, Tensors], dict[str, torch.Tensor]]:
    """`original_layout(transformer, vae)`: two state dicts of diffusers as one checkpoint is published."""
    return lambda transformer, vae: {**_original_transformer(transformer), **_original_vae(vae)}


@pytest.fixture(scope="session")
def unprojected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """`unprojected("tiny")`: a folder of that base whose CLIP-L has the identity as projection. Read only.

    So have the folders of the published models. A single file of the same weights gives the same conditioning.
    """
    written: dict[str, Path] = {}

    def write(name: str) -> str:
        if name not in written:
            written[name] = tmp_path_factory.mktemp("bases") / Path(name).name
            shutil.copytree(resolve_base(name).path, written[name])
            file = written[name] / "text_encoder" / "model.safetensors"
            tensors = load_file(file)
            tensors["text_projection.weight"] = torch.eye(len(tensors["text_projection.weight"]))
            save_file(tensors, file, metadata={"format": "pt"})
        return str(written[name])

    return write


@pytest.fixture(scope="session")
def tiny_in_bf16(tmp_path_factory: pytest.TempPathFactory, unprojected: Callable[[str], str]) -> str:
    """The folder of a base like `unprojected("tiny")` that is stored in bf16, as published models are. Read only."""
    folder = Path(shutil.copytree(unprojected("tiny"), tmp_path_factory.mktemp("bases") / "tiny-in-bf16"))
    for file in folder.glob("*/*.safetensors"):
        halved = {name: tensor.bfloat16() for name, tensor in load_file(file).items()}
        save_file(halved, file, metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="session")
def single_file(tmp_path_factory: pytest.TempPathFactory, original_layout) -> Callable[[str], Path]:
    """`single_file("tiny")`: that base as `model.safetensors`, with its encoders as files beside it. Read only.

    Where a run's dtype is the stored one, weights on the CPU are the mapped file, and the last bits of its products
    depend on where in the file a tensor lies. So whole runs are compared through `tiny_in_bf16`.
    """
    written: dict[str, Path] = {}

    def write(name: str) -> Path:
        if name not in written:
            base, folder = resolve_base(name), tmp_path_factory.mktemp(Path(name).name)
            parts = [
                load_file(base.path / part / "diffusion_pytorch_model.safetensors") for part in ("transformer", "vae")
            ]
            written[name] = folder / "model.safetensors"
            save_file(original_layout(*parts), written[name])
            for encoder, (_, part) in ENCODER_PARTS.items():
                shutil.copy(base.path / part / "model.safetensors", folder / f"{encoder}.safetensors")
        return written[name]

    return write


_TRANSFORMER_NAMES = (
    ("pos_embed.pos_embed", "pos_embed"),
    ("pos_embed.proj", "x_embedder.proj"),
    ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
    ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
    ("proj_out", "final_layer.linear"),
    ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    ("transformer_blocks", "joint_blocks"),
    ("norm1_context.linear", "context_block.adaLN_modulation.1"),
    ("norm1.linear", "x_block.adaLN_modulation.1"),
    ("ff_context.net.0.proj", "context_block.mlp.fc1"),
    ("ff_context.net.2", "context_block.mlp.fc2"),
    ("ff.net.0.proj", "x_block.mlp.fc1"),
    ("ff.net.2", "x_block.mlp.fc2"),
    ("attn.to_add_out", "context_block.attn.proj"),
    ("attn.norm_added_q", "context_block.attn.ln_q"),
    ("attn.norm_added_k", "context_block.attn.ln_k"),
    (r"(attn2?)\.to_out\.0", r"x_block.\1.proj"),
    (r"(attn2?)\.norm_([qk])", r"x_block.\1.ln_\2"),
)


def _renamed(name: str, rules: Sequence[tuple[str, Any]]) -> str:
    for ours, original in rules:
        name = re.sub(rf"(?<![a-z_]){ours}(?![a-z0-9_])", original, name)
    return name


def _original_transformer(state: Tensors) -> dict[str, torch.Tensor]:
    """Fuses q, k and v, and swaps scale and shift in the last normalisation and the last block's of the text."""
    last = max(int(found[1]) for name in state if (found := re.match(r"transformer_blocks\.(\d+)", name)))
    found: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        name, tensor = key, value
        if name.startswith(("norm_out", f"transformer_blocks.{last}.norm1_context")):
            scale, shift = tensor.chunk(2)
            tensor = torch.cat([shift, scale])
        fused = re.fullmatch(r"(.+\.attn2?)\.(to_q|add_q_proj)\.(weight|bias)", name)
        if fused:
            stream = "x_block" if fused[2] == "to_q" else "context_block"
            block, attention = fused[1].rsplit(".", 1)
            three = [state[f"{fused[1]}.{fused[2].replace('q', of)}.{fused[3]}"] for of in "qkv"]
            name, tensor = f"{block}.{stream}.{attention}.qkv.{fused[3]}", torch.cat(three)
        elif re.search(r"\.(to_[kv]|add_[kv]_proj)\.", name):
            continue
        found[f"model.diffusion_model.{_renamed(name, _TRANSFORMER_NAMES)}"] = tensor.clone()
    return found


def _original_vae(state: Tensors) -> dict[str, torch.Tensor]:
    last = max(int(found[1]) for name in state if (found := re.match(r"decoder\.up_blocks\.(\d+)", name)))
    names = (
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample"),
        (r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}"),
        (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
        (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
        (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
    )
    found = {}
    for name, tensor in state.items():
        was_convolution = ".attentions." in name and tensor.ndim == 2
        kept = tensor[:, :, None, None] if was_convolution else tensor
        found[f"first_stage_model.{_renamed(name, names)}"] = kept.clone()
    return found


@dataclass(frozen=True)
class Finished:
    """A command that has ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Command = Callable[..., Finished]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """`command("infer", "--lora", ...)`: the command line in this process."""

    def command(*arguments: object) -> Finished:
        monkeypatch.setattr(sys, "argv", ["sd3tune", *map(str, arguments)])
        monkeypatch.setenv("TQDM_MININTERVAL", "10")
        monkeypatch.setenv("COLUMNS", "200")
        capfd.readouterr()
        try:
            run()
            code: object = 0
        except SystemExit as stop:
            code = stop.code or 0
        printed = capfd.readouterr()
        assert isinstance(code, int)
        return Finished(code, printed.out, printed.err)

    return command
