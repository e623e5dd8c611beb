"""Textual inversion: a run, its file, `infer`, and the card's code for diffusers."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd3tune.adapter.embedding import read_embedding
from sd3tune.adapter.file import read_adapter
from sd3tune.commands.data_check import run_data_check
from sd3tune.commands.infer import run_infer
from sd3tune.commands.lora_inspect import inspect_lora
from sd3tune.commands.train import run_training
from sd3tune.config import parse_config
from sd3tune.errors import AdapterError, ConfigError, UserError
from sd3tune.files.png_recipe import RECIPE_KEY
from sd3tune.inference.image_request import Texts
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.prompts import Prompt, encode_prompts
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_text_encoder
from sd3tune.publish.files import files_of_product
from sd3tune.run.describe import describe_lr
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE
from sd3tune.training.loop import View

METHOD = "method={kind: textual_inversion, token: <rex>, vectors: 3, init: a dog, t5_caption: dog}"
PROMPT = "a photo of <rex>"
OPTIONS = (METHOD, "train.steps=3", "optimizer.lr=0.05", "checkpoint={every: 1, keep: 9}", "ema={decay: 0.5}",
           f"preview={{every: 3, prompts: [{PROMPT}], steps: 2, guidance: 4.0, seed: 11}}")  # fmt: skip
FILE = "embedding/learned_embeds.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pictures(write_images, tmp_path_factory) -> Path:
    folder = write_images(tmp_path_factory.mktemp("rex"), 3)
    for file in folder.glob("*.txt"):
        file.write_text(f"{PROMPT} outside")
    return folder


@pytest.fixture(scope="module")
def make(quick_config, pictures: Path):
    return lambda run, *more: quick_config(run, *OPTIONS, f"data.sources=[{{path: {pictures}}}]", *more)


@pytest.fixture(scope="module")
def run(make, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "rex"
    run_training(make(run))
    return run


def drawn(out: Path, *embeddings: Path, **more: object) -> Image.Image:
    asked = {"seed": 11, "steps": 2, "guidance": 4.0, "prompt": PROMPT, **more}
    job = InferenceJob.from_fields(embeddings=[str(path) for path in embeddings], out=out, **asked)
    return Image.open(run_infer(job)[0])


def preview_of(run: Path) -> bytes:
    return Image.open(run / "samples" / "step-000003-0.png").tobytes()


def test_infer_draws_the_preview_and_draws_it_again(run: Path, tmp_path: Path) -> None:
    image = drawn(tmp_path / "one", run)
    assert image.tobytes() == preview_of(run)
    (picture,) = (tmp_path / "one").glob("*.png")
    again = InferenceJob.from_fields(from_picture=picture, look_in=[run], out=tmp_path / "two")
    redrawn = Image.open(run_infer(again)[0])
    assert redrawn.tobytes() == image.tobytes()
    assert redrawn.info[RECIPE_KEY] == image.info[RECIPE_KEY]
    (recipe,) = json.loads(image.info[RECIPE_KEY])["embeddings"]
    assert recipe["name"] == "learned_embeds.safetensors"
    with pytest.raises(AdapterError, match="drawn with the embedding 'learned_embeds"):
        run_infer(InferenceJob.from_fields(from_picture=picture, out=tmp_path / "three"))


def test_the_vectors_have_the_vocabularys_norm_and_only_they_are_saved(run: Path) -> None:
    rows = load_file(run / FILE)
    assert sorted(rows) == ["clip_g", "clip_l"]
    for name, of in rows.items():
        table = load_text_encoder(resolve_base("tiny"), name, torch.float32).model.get_input_embeddings().weight
        norm = table.norm(dim=1).mean()
        torch.testing.assert_close(of.norm(dim=1), norm.expand(3), rtol=1e-5, atol=0)
        assert of.shape == (3, table.shape[1])
    checkpoint = load_file(run / "checkpoints/step-000003/state.safetensors")
    assert checkpoint["master"].numel() == 3 * (16 + 32)
    assert sorted(files_of_product(run)) == [FILE, FILE.replace("embedding/", "embedding_raw/")]


def test_the_contract_states_the_token_and_what_t5_reads(run: Path) -> None:
    found = read_embedding(run)
    assert (found.token, found.vectors, found.t5_caption) == ("<rex>", 3, "dog")
    assert found.contract["method"] == "textual_inversion"
    assert found.contract["encoders"] == ["clip_l", "clip_g", "t5"]


def test_the_first_preview_is_near_the_class_and_t5_reads_only_its_words(run: Path) -> None:
    asked, names = [Prompt(Texts(PROMPT)), Prompt(Texts("a photo of dog"))], ("clip_l", "clip_g", "t5")
    learned, plain = encode_prompts(resolve_base("tiny"), names, asked, 16, torch.float32, CPU,
                                    embeddings=[read_embedding(run)])  # fmt: skip
    assert torch.equal(learned.prompt_embeds[:, 77:], plain.prompt_embeds[:, 77:])
    assert not torch.equal(learned.prompt_embeds[:, :77], plain.prompt_embeds[:, :77])
    (alone,) = encode_prompts(resolve_base("tiny"), names, asked[1:], 16, torch.float32, CPU)
    assert torch.equal(plain.prompt_embeds, alone.prompt_embeds)  # a prompt without the token is as ever
    assert torch.equal(plain.pooled_prompt_embeds, alone.pooled_prompt_embeds)


def test_the_cards_code_draws_the_preview_with_equal_embeddings(run: Path, tmp_path: Path, monkeypatch) -> None:
    card = (run / "README.md").read_text()
    assert "| trained | 3 vectors for `<rex>` in CLIP-L and CLIP-G, from the words `a dog` |" in card
    assert "sd3tune infer --embedding . --prompt" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    base = shutil.copytree(resolve_base("tiny").path, tmp_path / "base")
    for part in (
        "text_encoder",
        "text_encoder_2",
    ):  # as published: CLIP then takes the highest token for the text's end
        config = base / part / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": 2}))
    code = re.sub("(?m)^base = .*$", f"base = {str(base)!r}", code)
    shutil.copytree(run / "embedding", tmp_path / "embedding")
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


def test_several_embeddings_are_used_at_once_and_one_of_another_tool_by_its_name(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "toto.safetensors"
    save_file({"clip_l": torch.randn(2, 16), "clip_g": torch.randn(2, 32)}, other)
    both = drawn(tmp_path / "both", run, other, prompt=f"{PROMPT} beside toto")
    one = drawn(tmp_path / "one", run, prompt=f"{PROMPT} beside toto")
    assert both.tobytes() != one.tobytes()
    assert drawn(tmp_path / "same", run, other).tobytes() == preview_of(run)


@pytest.mark.parametrize("optimizer", ["adamw8bit", pytest.param("adamw", marks=pytest.mark.long)])
def test_a_run_that_was_killed_ends_as_if_it_had_not_been(make, tmp_path: Path, optimizer: str) -> None:
    more = (f"optimizer={{kind: {optimizer}, lr: 0.05}}", "model.quantize=nf4", "preview={prompts: []}")
    configs = [make(tmp_path / name, *more) for name in ("straight", "killed")]
    run_training(configs[0])

    def kill(view: View) -> None:
        if view.step == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(configs[1], callbacks=[kill])
    run_training(configs[1], resume=True)
    for name in (FILE, "checkpoints/step-000003/state.safetensors"):
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


def test_mistakes_are_one_line(run: Path, make, tmp_path: Path) -> None:
    wide, half = tmp_path / "wide.safetensors", tmp_path / "half.safetensors"
    save_file({"clip_l": torch.ones(1, 768), "clip_g": torch.ones(1, 1280)}, wide)
    save_file({"clip_l": torch.ones(1, 16)}, half)
    blank, rows = tmp_path / "blank.safetensors", {"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 32)}
    save_file(rows, blank, {"sd3tune": json.dumps({"token": " ", "t5_caption": "dog"})})
    for files, says in (
        ([wide], "made for another base: clip_l has vectors of 768 numbers, and in tiny they have 16"),
        ([half], "no embedding for SD3: its tensors must be clip_l and clip_g, and they are clip_l"),
        ([run, run], "2 files are for the token <rex>"),
        ([tmp_path / "none"], "no such file"),
        ([blank], "its metadata states no token"),
    ):
        with pytest.raises(AdapterError) as caught:
            drawn(tmp_path / "out", *files, base="tiny")
        assert any(says in problem for problem in caught.value.problems)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=r"method\.token: <max> is in no caption"):
        run_training(make(tmp_path / "x", METHOD.replace("<rex>", "<max>")))
    with pytest.raises(ConfigError, match=r"method\.token: a is a word that CLIP knows; take a new one, such as <a>"):
        run_training(make(tmp_path / "y", METHOD.replace("<rex>", "a")))
    save_file(rows, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="'a' is a word that clip_l knows; rename the file"):
        drawn(tmp_path / "out", tmp_path / "a.safetensors", base="tiny")
    with pytest.raises(ConfigError, match="trains only a few vectors"):
        make(tmp_path / "x", "train.fused_backward=true", "train.max_grad_norm=null")


def test_the_report_compares_with_the_first_vectors(make, tmp_path: Path) -> None:
    """Not with the class words, which the base reads: without training, nothing has changed but rounding."""
    run_training(make(tmp_path / "run", "optimizer={lr: 1.0e-7, weight_decay: 0}", "train.steps=1", "ema=null"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["report"]["velocity_change"] < 1e-4


def test_a_lora_command_names_the_option_for_a_learned_word(run: Path) -> None:
    with pytest.raises(AdapterError, match=r"holds the embedding of a token and no adapter; draw with --embedding"):
        read_adapter(run)


def test_the_default_learning_rate_is_its_own(tiny_images: Path, tmp_path: Path) -> None:
    """A written one counts, and so does the default of an optimizer whose rates are not AdamW's."""
    for method, optimizer, lr in (
        ({"kind": "textual_inversion"}, None, 5e-3),
        ({"kind": "textual_inversion"}, {"kind": "adamw8bit"}, 5e-3),
        ({"kind": "textual_inversion"}, {"lr": 1e-4}, 1e-4),
        ({"kind": "textual_inversion"}, {"kind": "prodigy"}, 1.0),
        ({"kind": "pivotal"}, {}, 1e-4),
        ({}, None, 1e-4),
    ):
        values = {"method": method, "data": {"sources": [{"path": str(tiny_images)}]}}
        config = parse_config(values if optimizer is None else {**values, "optimizer": optimizer}).config
        assert config.optimizer.lr == lr
        said = describe_lr(config)
        assert said == ["note: optimizer.lr is 0.005, the default of method.kind textual_inversion"] * (lr == 5e-3)
    assert parse_config(values, ["method.kind=textual_inversion"]).config.optimizer.lr == 5e-3


def test_what_would_learn_little_is_said_before_training(make, tmp_path: Path, capsys, pictures: Path) -> None:
    """CLIP reads 77 tokens."""
    long = METHOD.replace("vectors: 3", "vectors: 64")
    config = make(tmp_path / "run", long, "preview={prompts: [<rex> and <rex>]}")
    encode(make_plan(config, CPU, resume=None), ALONE, print)
    said = capsys.readouterr().out
    for name in ("clip_l", "clip_g"):  # 2 x 64 vectors, `and`, begin and end
        assert f"1 caption too long: {name} reads 77 tokens, so the last 54 of '<rex> and <rex>' are cut off" in said
    (pictures / "long.txt").write_text("<rex> and <rex>")
    try:
        only = min(pictures.glob("*.png"))
        shutil.copy(only, pictures / "long.png")
        run_data_check(config, tmp_path / "sheet.png")
    finally:
        for name in ("long.txt", "long.png"):
            (pictures / name).unlink()
    said = capsys.readouterr().out
    assert "tokens    CLIP: at most 131 of 77" in said
    assert "warning: 1 caption beyond 77 CLIP tokens: of '<rex> and <rex>' the last 54 are cut off" in said


def test_a_word_that_no_prompt_has_is_said(run: Path, tmp_path: Path, capsys) -> None:
    drawn(tmp_path, run, prompt="a photo of a dog")
    assert (
        "learned_embeds.safetensors: no prompt has its token, <rex>, so its vectors change" in capsys.readouterr().out
    )


def test_an_embedding_is_inspected(run: Path, tmp_path: Path) -> None:
    save_file({"clip_l": torch.ones(1, 16), "clip_g": torch.ones(1, 32)}, tmp_path / "toto.safetensors")
    lines = inspect_lora(run)
    assert lines[0] == f"{run / FILE}: the embedding of a token"
    assert "token     <rex>, for which T5 reads dog" in lines
    norms = read_embedding(run).rows["clip_l"].norm(dim=1).tolist()
    assert f"CLIP-L    3 vectors of 16 numbers, norms {', '.join(f'{norm:.4g}' for norm in norms)}" in lines
    assert any("method: textual_inversion" in line for line in lines)
    foreign = inspect_lora(tmp_path / "toto.safetensors")
    assert "base      not stated: another tool wrote it" in foreign
    assert "CLIP-G    1 vector of 32 numbers, norm 5.657" in foreign
