"""Pivotal tuning: the frozen token, the two files of its folder, and every command that reads them."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd3tune.adapter.embedding import EMBEDDING_FILE, read_embedding
from sd3tune.adapter.file import ADAPTER_FILE, read_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.lora_inspect import inspect_lora
from sd3tune.commands.lora_verify import verify_lora
from sd3tune.commands.train import run_training
from sd3tune.config import Config
from sd3tune.errors import AdapterError, ConfigError, RunError, UserError
from sd3tune.evaluation.pictures import plan_drawings
from sd3tune.evaluation.request import EvalRequest
from sd3tune.evaluation.target import find_target
from sd3tune.inference.image_request import Texts
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.prompts import Prompt, encode_prompts
from sd3tune.measures import prompts as measured
from sd3tune.measures.prompts import Prompts
from sd3tune.model.base.resolve import resolve_base
from sd3tune.publish.files import files_of_product, is_product_name
from sd3tune.training.loop import View

TOKEN = "method.embedding={token: <rex>, vectors: 3, init: a dog, t5_caption: dog, lr: 0.05}"
PROMPT = "a photo of <rex>"
OPTIONS = ("method={kind: pivotal, rank: 2, alpha: 2.0}", TOKEN, "train.steps=4", "checkpoint={every: 1, keep: 9}",
           "ema={decay: 0.5}",
           f"preview={{every: 4, prompts: [{PROMPT}], steps: 2, guidance: 4.0, seed: 11}}")  # fmt: skip
FILES = (EMBEDDING_FILE, ADAPTER_FILE)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def make(quick_config, write_images, tmp_path_factory):
    folder = write_images(tmp_path_factory.mktemp("rex"), 3)
    for file in folder.glob("*.txt"):
        file.write_text(f"{PROMPT} outside")
    return lambda run, *more: quick_config(run, *OPTIONS, f"data.sources=[{{path: {folder}}}]", *more)


@pytest.fixture(scope="module")
def run(make, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "rex"
    run_training(make(run))
    return run


def drawn(out: Path, *loras: object, **more: object) -> list[Image.Image]:
    asked = {"seed": 11, "steps": 2, "guidance": 4.0, "prompt": PROMPT, "before": False, **more}
    files = run_infer(InferenceJob.from_fields(loras=[str(path) for path in loras], out=out, **asked))
    return [Image.open(file) for file in files]


def preview_of(run: Path, name: str = "step-000004-0.png") -> bytes:
    return Image.open(run / "samples" / name).tobytes()


def values_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The master of a checkpoint, by name of the parameter."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    layout = json.loads((folder / "state.json").read_text())["layout"]
    flat = load_file(folder / "state.safetensors")["master"]
    return dict(zip(layout, flat.split([torch.Size(shape).numel() for shape in layout.values()]), strict=True))


def test_the_token_is_trained_at_its_own_rate_then_frozen_and_the_adapter_throughout(run: Path) -> None:
    at = [values_at(run, step) for step in (1, 2, 3, 4)]
    names = ["text_encoder.tokens", "text_encoder_2.tokens"]
    assert list(at[0])[-2:] == names
    for name, first in at[0].items():
        moved = [(after[name] - before[name]).abs().max().item() for before, after in itertools.pairwise(at)]
        if name in names:
            assert moved[0] == pytest.approx(0.05, rel=0.5)
            assert moved[1:] == [0, 0]
            assert first.any()
        else:
            assert 0 < min(moved) <= max(moved) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(make, tmp_path: Path, step: int, assert_equal_runs) -> None:
    more = ("optimizer={kind: adamw8bit, lr: 0.01}", "model.quantize=nf4", "preview={prompts: []}")
    names = ("straight", "killed")
    run_training(make(tmp_path / names[0], *more))

    def kill(view: View) -> None:
        if view.step == step:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(make(tmp_path / names[1], *more), callbacks=[kill])
    run_training(make(tmp_path / names[1], *more), resume=True)
    assert_equal_runs(*(tmp_path / name for name in names))


def test_its_folder_is_drawn_whole_and_again(run: Path, tmp_path: Path, capsys) -> None:
    (image,) = drawn(tmp_path / "one", run)
    assert image.tobytes() == preview_of(run)
    assert ": 3 vectors for <rex> loaded into CLIP-L and CLIP-G" in capsys.readouterr().out
    (picture,) = (tmp_path / "one").glob("*.png")
    files = run_infer(InferenceJob.from_fields(from_picture=picture, look_in=[run], out=tmp_path / "two"))
    assert Image.open(files[0]).tobytes() == image.tobytes()
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(run / "adapter" / ADAPTER_FILE, alone)
    with pytest.raises(AdapterError, match="drawn with the adapter 'rex'"):
        run_infer(InferenceJob.from_fields(from_picture=picture, look_in=[alone], out=tmp_path / "three"))
    drawn(tmp_path / "four", alone)
    assert f"was trained with the token <rex>, and {EMBEDDING_FILE} is not beside it" in capsys.readouterr().out
    (both,) = drawn(tmp_path / "five", alone, embeddings=[str(run)])
    assert both.tobytes() == image.tobytes()
    drawn(tmp_path / "six", run, prompt="a photo of a dog")
    assert "no prompt has its token, <rex>, so its vectors change nothing" in capsys.readouterr().out


def test_each_checkpoint_uses_its_own_vectors_and_the_base_reads_the_class_word(run: Path, tmp_path: Path) -> None:
    steps = [run / "checkpoints" / f"step-{step:06d}" for step in (1, 4)]
    grid = [f"lora={steps[0]},{steps[1]}"]
    together = drawn(tmp_path / "grid", grid=grid)[:2]
    alone = [drawn(tmp_path / step.name, step)[0] for step in steps]
    assert [image.tobytes() for image in together] == [image.tobytes() for image in alone]
    assert together[1].tobytes() == preview_of(run)
    with pytest.raises(AdapterError, match="2 files are for the token <rex>"):
        drawn(tmp_path / "both", *steps)
    request, target = EvalRequest(str(run), checkpoints="all", seeds=1), find_target(str(run), "all")
    prompts = Prompts([measured.Prompt("<rex> on a beach", "dog on a beach")], [], [])
    (drawing,) = plan_drawings(request, target, prompts, tmp_path / "eval")
    asked = {one.picture.row: one.request.prompt for one in drawing.wanted}
    assert asked == {"base": "dog on a beach", **{f"step {step}": "<rex> on a beach" for step in (1, 2, 3, 4)}}


def test_the_cards_code_has_the_embeddings_of_infer(run: Path, tmp_path: Path, monkeypatch) -> None:
    card = (run / "README.md").read_text()
    assert "| trained | 3 vectors for `<rex>` in CLIP-L and CLIP-G, from the words `a dog` |" in card
    assert "| vectors | trained at learning rate 0.05, and frozen after 50% of the steps |" in card
    assert "sd3tune infer --lora . --prompt" in card
    assert f"ComfyUI reads `adapter/{EMBEDDING_FILE}`, copied to `models/embeddings/NAME.safetensors`" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(code, "card", "exec"), names)
    assert Image.open("image.png").tobytes() == preview_of(run)
    with torch.no_grad():
        theirs = names["pipe"].encode_prompt(  # type: ignore[attr-defined]
            "a photo of <rex> <rex>_1 <rex>_2", None, "a photo of dog", max_sequence_length=16
        )
    (ours,) = encode_prompts(resolve_base("tiny"), ("clip_l", "clip_g", "t5"), [Prompt(Texts(PROMPT))], 16,
                             torch.float32, CPU, embeddings=[read_embedding(run)])  # fmt: skip
    assert torch.equal(ours.prompt_embeds, theirs[0])
    assert torch.equal(ours.pooled_prompt_embeds, theirs[2])


def test_other_commands_name_both_files(run: Path, tmp_path: Path) -> None:
    assert sorted(files_of_product(run)) == sorted(f"{name}/{file}" for name in ("adapter", "adapter_raw")
                                                   for file in FILES)  # fmt: skip
    assert is_product_name(Path("adapter") / EMBEDDING_FILE)
    lines = convert_lora(run, "kohya", tmp_path / "kohya.safetensors")
    assert any(EMBEDDING_FILE in line and "embedding:NAME" in line for line in lines)
    inspected = inspect_lora(run)
    assert "token     <rex>, for which T5 reads dog" in inspected
    assert any(line.startswith("CLIP-G    3 vectors of 32 numbers, norms ") for line in inspected)
    assert read_adapter(tmp_path / "kohya.safetensors").factors.keys() == read_adapter(run).factors.keys()
    assert any("drawn again by diffusers: equal to the pixel" in line for line in verify_lora(run, None, "auto"))


def test_a_run_goes_on_from_its_vectors(run: Path, make, tmp_path: Path) -> None:
    def goes_on(*more: str) -> Config:
        return make(tmp_path / "next", f"method.start_from={run}", "train.steps=1", "preview={prompts: []}", *more)

    begun = load_file(run / "adapter" / EMBEDDING_FILE)
    run_training(goes_on("optimizer.lr=1.0e-9", "method.embedding.lr=1.0e-9", "ema=null"))
    for name, rows in load_file(tmp_path / "next" / "adapter" / EMBEDDING_FILE).items():
        torch.testing.assert_close(rows, begun[name], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="has 3 vectors for <rex> where this run has 2 vectors for <rex>"):
        run_training(goes_on("method.embedding.vectors=2"))
    with pytest.raises(UserError, match=r"also has vectors for <rex>, .* set method\.kind=pivotal"):
        run_training(goes_on(f"method={{kind: lora, rank: 2, start_from: {run}}}"))


def test_mistakes_are_one_line(run: Path, make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"method\.embedding\.token: <max> is in no caption"):
        run_training(make(tmp_path / "x", TOKEN.replace("<rex>", "<max>")))
    with pytest.raises(ConfigError, match=r"text_encoders=.*: unknown key with kind pivotal; it belongs to kind lora"):
        make(tmp_path / "x", "method.text_encoders={clip_l: {}}")
    with pytest.raises(ConfigError, match=r"method\.kind pivotal gives parameters learning rates of their own"):
        make(tmp_path / "x", "train.fused_backward=true", "train.max_grad_norm=null")
    with pytest.raises(ConfigError, match=r"method\.kind pivotal gives parameters rates of their own"):
        make(tmp_path / "x", "optimizer={kind: schedulefree}", "schedule={kind: constant}")
    with pytest.raises(RunError, match=r"--resume: train\.steps: 4 in the run, 5 now"):
        run_training(make(run, "train.steps=5"), resume=True)
    damaged = tmp_path / "damaged"
    shutil.copytree(run / "adapter", damaged)
    save_file({"clip_l": torch.ones(3, 16)}, damaged / EMBEDDING_FILE)
    with pytest.raises(AdapterError, match="no embedding for SD3"):
        drawn(tmp_path / "out", damaged)
