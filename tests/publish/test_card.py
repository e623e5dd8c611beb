"""The model card: what the Hub reads, what people copy and run, and no path of the machine it was made on."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from PIL import Image, ImageChops

from sd3tune.adapter.file import ADAPTER_FILE, read_adapter
from sd3tune.cli.main import app
from sd3tune.commands.train import run_training
from sd3tune.config import Config, load_config
from sd3tune.config.yaml12 import parse
from sd3tune.model.base.resolve import resolve_base
from sd3tune.publish.card import Drawing, Sample, Trained, card, is_unchanged
from sd3tune.publish.files import config_of_run
from sd3tune.run.card import card_of, card_to_upload, write_card
from sd3tune.run.folder import holds_report

PROMPT = "a photo of sks dog on a beach"
LOOKED = f"preview={{every: 2, prompts: [{PROMPT}, a cat], steps: 2, guidance: 3.5, seed: 4}}"
DESCRIBED: dict[str, Any] = {
    "versions": {"sd3tune": "0.1", "torch": "2.9", "python": "3.11"}, "world_size": 2, "device": "cuda",
    "images": 12, "images_per_epoch": 40, "captions": 7, "held_out_images": 3, "class_images": 100, "resumes": [],
    "gpu": "NVIDIA H100", "timings": {"train_s": 425.0},
    "report": {
        "velocity_change": 0.0173,
        "block_changes": {"block 0": 0.25, "block 1": 0.5},
        "fixed_noise_loss": {"sigma": [0.2, 0.8], "base": [3.25, 3.0], "trained": [3.125, 2.5]},
    },
}  # fmt: skip
HUB = {"base": "stabilityai/stable-diffusion-3.5-medium", "base_kind": "hub", "base_revision": "b940f67"}


@pytest.fixture(scope="module")
def run(quick_config, tiny_images: Path, tmp_path_factory) -> Path:
    """A finished run on a local folder, one caption for all, T5 off. The base lies beside its card."""
    root = tmp_path_factory.mktemp("cards")
    base = shutil.copytree(resolve_base("tiny").path, root / "my-sd3")
    photos = root / "photos"
    photos.mkdir()
    shutil.copy(tiny_images / "0.png", photos)
    source = f"data.sources=[{{path: {photos}, caption: a photo of sks dog}}]"
    more = ("model.t5=false", "train.steps=3", "method.alpha=3.0", LOOKED)
    run_training(quick_config(root / "run", f"model.base={base}", source, *more))
    (root / "run" / "my-sd3").symlink_to(base)
    return root / "run"


@pytest.fixture(scope="module")
def contract(run: Path) -> dict[str, Any]:
    return read_adapter(run).contract


@pytest.fixture
def config(quick_config, tmp_path: Path) -> Config:
    return quick_config(tmp_path / "run", "train.batch_size=2", "train.gradient_accumulation=4")


@pytest.fixture
def trained(config: Config, contract: dict[str, Any]) -> Trained:
    return Trained(config, contract, DESCRIBED)


def about(trained: Trained, **contract: Any) -> Trained:
    return replace(trained, contract={**trained.contract, **contract})


def header(text: str) -> dict[str, Any]:
    """The same for a parser of YAML 1.1, for one of 1.2 and for the Hub's own."""
    start, raw, _ = text.split("---\n", 2)
    assert start == ""
    found = yaml.safe_load(raw)
    assert parse(raw).value == found
    assert ModelCard(text).data.to_dict() == found
    return found


def written(run: Path) -> str:
    return (run / "README.md").read_text(encoding="utf-8")


def body(text: str) -> list[Any]:
    """The tokens of the Markdown, without its header."""
    return MarkdownIt().enable("table").parse(text.split("\n---\n", 1)[1])


def block(text: str, language: str) -> str:
    (found,) = (token.content for token in body(text) if token.type == "fence" and token.info == language)
    return found


def cells(text: str) -> dict[str, str]:
    """The rows of the table of how it was trained, the one of two columns."""
    found = [[token.content for token in row if token.type == "inline"] for row in rows(body(text))]
    return {row[0]: row[1] for row in found if len(row) == 2}


def rows(tokens: list[Any]) -> list[list[Any]]:
    """The tokens of each row of a table but its header."""
    starts = [number for number, token in enumerate(tokens) if token.type == "tr_open"]
    ends = [number for number, token in enumerate(tokens) if token.type == "tr_close"]
    found = [tokens[start:end] for start, end in zip(starts, ends, strict=True)]
    return [row for row in found if row[1].type == "td_open"]


def test_a_run_ends_with_a_card_that_shows_and_names_its_prompt(run: Path) -> None:
    text = written(run)
    assert header(text) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "diffusers", "sd3tune", "lora", "template:sd-lora"],
        "instance_prompt": "a photo of sks dog",
        "widget": [
            {"text": PROMPT, "output": {"url": "samples/step-000003-0.png"}},
            {"text": "a cat", "output": {"url": "samples/step-000003-1.png"}},
        ],
    }
    assert all((run / picture["output"]["url"]).is_file() for picture in header(text)["widget"])
    assert "\n<Gallery />\n" in text
    assert "Every image had one caption, `a photo of sks dog`: prompt with it" in text
    assert "A LoRA adapter for `my-sd3`, trained with sd3tune." in text
    assert "The base was a folder named `my-sd3`, whose licence applies" in text


def test_no_path_of_the_machine_is_in_it(run: Path) -> None:
    for folder in {run, *run.parents, Path.home(), Path.cwd()} - {Path("/")}:
        assert f"{folder}/" not in written(run)


def test_command_and_snippet_run_as_they_stand_and_draw_the_picture_above(
    run: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(run)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # diffusers' way of calling an argument deprecated
        exec(compile(block(written(run), "python"), "card", "exec"), {})
    words = shlex.split(block(written(run), "bash"))
    assert words == ["sd3tune", "infer", "--lora", ".", "--prompt", PROMPT, "--seed", "4"]
    app([*words[1:], "--no-before", "--out", str(tmp_path)], standalone_mode=False)
    (drawn,) = tmp_path.glob("*.png")
    assert "These settings drew the first picture above." in written(run)
    for path in (run / "image.png", drawn):
        assert ImageChops.difference(Image.open(path), Image.open("samples/step-000003-0.png")).getbbox() is None


def test_a_base_that_comes_with_sd3tune_is_found_by_the_snippet(trained: Trained) -> None:
    code = block(card(about(trained, base="nano", base_kind="nano")), "python").split("pipe = ")[0]
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)
    assert names["base"] == str(resolve_base("nano").path)


def test_the_snippet_reads_a_single_file_into_the_pipeline_of_its_released_model(
    trained: Trained, single_file, tmp_path: Path, monkeypatch
) -> None:
    released = shutil.copytree(resolve_base("tiny").path, tmp_path / "released")
    file = about(
        trained, base="model.safetensors", base_kind="file", base_released_as="released", encoders=["clip_l", "clip_g"]
    )
    shutil.copy(single_file("tiny"), tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(block(card(file), "python").split("pipe.load_lora")[0], "card", "exec"), names)
    expected = resolve_base("tiny").path / "transformer"
    assert Path(released, "transformer").is_dir()
    held = names["pipe"].transformer.state_dict()
    wanted = type(names["pipe"].transformer).from_pretrained(expected).state_dict()
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in wanted.items())
    assert names["pipe"].text_encoder_3 is None
    assert "Its shape is that of `released`; its weights were not compared." in card(file)
    assert "base_model" not in header(card(file))
    unknown = card(about(file, base_released_as=None))
    assert "```python" not in unknown
    assert "diffusers alone cannot draw with it as it was trained" in unknown
    assert "sd3tune infer --lora user/dog --config config.yaml --prompt" in card(replace(file, repo_id="user/dog"))


def test_the_configuration_in_the_repository_finds_a_base_beside_it(run: Path, tmp_path: Path, monkeypatch) -> None:
    """As `--config config.yaml` is told by the card of a base that is a folder."""
    (tmp_path / "config.yaml").write_bytes(config_of_run(run))
    (tmp_path / "my-sd3").symlink_to((run / "my-sd3").resolve())
    shutil.copy(run / "adapter" / ADAPTER_FILE, tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["infer", "--lora", ADAPTER_FILE, "--config", "config.yaml", "--prompt", PROMPT, "--no-before"]
    app([*words, "--steps", "2", "--guidance", "3.5", "--seed", "4"], standalone_mode=False)
    (drawn,) = Path("images").glob("*.png")
    expected = Image.open(run / "samples" / "step-000003-0.png")
    assert ImageChops.difference(Image.open(drawn), expected).getbbox() is None


LICENCES = [
    ("stabilityai/stable-diffusion-3.5-medium", "stabilityai-ai-community", "LICENSE.md"),
    ("stabilityai/stable-diffusion-3.5-large", "stabilityai-ai-community", "LICENSE.md"),
    ("stabilityai/stable-diffusion-3.5-large-turbo", "stabilityai-ai-community", "LICENSE.md"),
    ("stabilityai/stable-diffusion-3-medium-diffusers", "stabilityai-nc-research-community", "LICENSE"),
]


@pytest.mark.parametrize(("base", "name", "file"), LICENCES)
def test_a_known_base_is_linked_with_its_licence(base: str, name: str, file: str, trained: Trained) -> None:
    """What the cards of the bases themselves say, with the file they link to."""
    text = card(about(trained, **{**HUB, "base": base}))
    link = f"https://huggingface.co/{base}/blob/main/{file}"
    found = header(text)
    assert (found["base_model"], found["base_model_relation"]) == (base, "adapter")
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", name, link)
    assert f"The licence of the base, `{base}`, applies: [Stability AI " in text
    assert f"]({link})" in text
    assert f"accepted on [its page](https://huggingface.co/{base}) and `hf auth login` has run." in text
    assert f'from_pretrained("{base}", dtype=dtype' in text
    assert cells(text)["base model"] == f"`{base}` at `b940f67`"


@pytest.mark.parametrize(
    ("changed", "licence", "sentence"),
    [
        ({"base_kind": "hub", "base": "user/sd3"}, None, "see [its page](https://huggingface.co/user/sd3)."),
        ({"base_kind": "nano", "base": "nano"}, "apache-2.0", "of the base, `nano`, applies: Apache License 2.0."),
        ({"base_kind": "tiny", "base": "tiny"}, None, "No licence is claimed: the base, `tiny`, has random"),
        ({"base_kind": "folder", "base": HUB["base"]}, None, "The base was a folder named"),
        ({"base_kind": "file", "base": "a.safetensors", "base_released_as": HUB["base"]}, None, "Its shape is that of"),
    ],
)  # fmt: skip
def test_of_another_base_no_licence_and_no_descent_is_claimed(
    changed: dict[str, str], licence: str | None, sentence: str, trained: Trained
) -> None:
    text = card(about(trained, **changed))
    found = header(text)
    assert "hf auth login" not in text
    assert found.get("license") == licence
    assert not found.keys() & {"license_name", "license_link"}
    assert found.get("base_model") == (changed["base"] if changed["base_kind"] == "hub" else None)
    assert sentence in text


def test_a_whole_model_from_scratch_descends_from_nothing(trained: Trained) -> None:
    full = about(trained, **HUB, method="full", init="pretrained", export_dtype="bf16")
    without_rank = {name: value for name, value in full.contract.items() if name not in ("rank", "alpha")}
    full = replace(full, contract=without_rank)
    assert header(card(full))["base_model_relation"] == "finetune"
    assert "template:sd-lora" not in header(card(full))["tags"]
    text = card(replace(about(full, init="random"), repo_id="user/dog"))
    assert "base_model" not in header(text)
    assert "The text encoders and the VAE in it are the base's." in text
    assert "hf download user/dog --include 'model/*' --local-dir .\nsd3tune infer --base model --prompt" in text
    assert 'snapshot_download("user/dog", allow_patterns="model/*")' in text


def test_it_states_how_it_was_made(trained: Trained, quick_config, tmp_path: Path) -> None:
    kept = quick_config(
        tmp_path, "train.batch_size=2", "train.gradient_accumulation=4", "ema={decay: 0.9}",
        "data.sources.0.prior={prompt: [a photo of a dog, a puppy], weight: 0.5}",
    )  # fmt: skip
    found = cells(card(replace(about(trained, dtype="bf16"), config=kept)))
    for name, value in {
        "rank, alpha": "2, 3 (folded into the file: alpha = rank there)",
        "weights": "exponential moving average, decay 0.9; as trained in `adapter_raw`",
        "data": "12 images with 7 captions, 40 in an epoch with their repeats",
        "held out": "3 images, not trained on",
        "class images": "100",
        "prior preservation": "class images of `a photo of a dog`, `a puppy`, weight 0.5",
        "resolution": "64 px, aspect buckets",
        "steps": "3, batch 2 x 4 x 2 processes",
        "images seen": "48, 1.2 epochs",
        "optimizer": "adamw, learning rate 0.01, constant",
        "sigma": "logit_normal (mean 0, std 1), shift 1, weighting none",
        "T5 tokens": "16, T5 not used",
        "precision": "bf16; trained parameters and optimizer in fp32",
        "device": "NVIDIA H100",
        "time": "7 minutes of training",
        "versions": "sd3tune 0.1, torch 2.9",
    }.items():
        assert found[name] == value, name
    assert "Prior preservation was used" in card(replace(trained, config=kept))
    assert "Prior preservation was not used" in card(trained)


@pytest.mark.parametrize(
    ("stated", "said", "cell"),
    [
        ({"encoders": ["clip_l", "clip_g", "t5"]}, "It was trained at T5 length 16. ", "16"),
        (
            {"encoders": ["clip_l", "clip_g", "t5"], "max_sequence_length": 77, "t5_lengths": [77, 256]},
            "It was trained at T5 lengths 77, 256, each in an equal share of the steps. ",
            "77, 256",
        ),
        ({}, "T5 was left out: ", "16, T5 not used"),
    ],
    ids=["one length", "several lengths", "no T5"],
)
def test_it_names_the_t5_lengths_and_what_sets_one_in_each_tool(
    trained: Trained, stated: dict[str, Any], said: str, cell: str
) -> None:
    length = stated.get("max_sequence_length", 16)
    text = card(about(trained, **stated))
    (limit,) = (line for line in text.splitlines() if f"- {said}" in line)
    assert f"`max_sequence_length={length}`" in limit
    assert (
        f"`T5TokenizerOptions`, between the CLIP loader and both prompts, sets it: `min_length` {length}." in limit
    ) == ("t5" in stated.get("encoders", []))
    assert cells(text)["T5 tokens"] == cell


def test_it_states_what_was_measured_and_what_was_not(trained: Trained) -> None:
    text = card(trained)
    for line in (
        "| 0.2 | 3.2500 | 3.1250 |",
        "| 0.8 | 3.0000 | 2.5000 |",
        "One denoising step changes by 1.73 %. The norm of the weight update by block: 0: 0.25, 1: 0.5.",
    ):
        assert line in text.splitlines(), line
    assert "and image quality, nor the held-out loss." in text
    assert "On the" not in text
    last = {
        "step": 800, "images": 4, "loss": 0.75, "base_loss": 1.0,
        "loss_by_sigma": {"0.0-0.2": 0.5, "0.2-0.4": None}, "base_loss_by_sigma": {"0.0-0.2": 0.625, "0.2-0.4": 0.25},
    }  # fmt: skip
    held_out = {"last": last, "best": {**last, "step": 600, "loss": 0.7}}
    text = card(replace(trained, run_facts={**DESCRIBED, "report": {**DESCRIBED["report"], "held_out": held_out}}))
    for line in (
        "On the 4 images that were not trained on:",
        "| 0.0-0.2 | 0.6250 | 0.5000 |",
        "| 0.2-0.4 | 0.2500 | not finite |",
        "| mean | 1.0000 | 0.7500 |",
        "The lowest mean held-out loss was 0.7000, at step 600. The step that draws best can be another.",
    ):
        assert line in text.splitlines(), line
    assert "nor the held-out loss" not in text


@pytest.mark.parametrize(
    ("change", "start", "warned"),
    [
        (0.0173, None, False),
        (0.75, None, False),
        (0.76, None, True),
        (1.27, "pretrained", True),
        (1.0, "random", False),
    ],
)
@pytest.mark.parametrize("loss", [2.9, 3.1])
def test_a_change_that_only_a_diverged_training_makes_is_warned_of(
    trained: Trained, change: float, start: str | None, warned: bool, loss: float
) -> None:
    losses = {"sigma": [0.2, 0.8], "base": [3.0, 3.0], "trained": [loss, 3.0]}
    diverged = {**DESCRIBED, "report": {**DESCRIBED["report"], "velocity_change": change, "fixed_noise_loss": losses}}
    text = card(replace(about(trained, init=start), run_facts=diverged))
    assert ("the training has diverged.**" in text) == (warned and loss > 3)


def test_a_checkpoint_of_a_run_that_goes_on_claims_no_end(trained: Trained) -> None:
    described = {name: value for name, value in DESCRIBED.items() if name != "report"} | {"timings": {}}
    samples = [Sample("samples/step-000002-0.png", 2, Drawing(PROMPT, 28, 4.5))]
    goes_on = replace(trained, run_facts=described, step=2, samples=samples)
    text = card(goes_on)
    assert "It is not finished: this is step 2 of 3." in text
    assert "Nothing yet: this is step 2 of 3 of an unfinished run." in text
    assert cells(text)["steps"] == "2, batch 2 x 4 x 2 processes"
    assert "time" not in cells(text)
    assert "These settings drew the first picture above." in text
    assert "the first of the pictures above" not in card(replace(goes_on, step=3))


NASTY = [
    'it\'s "his" $HOME `dog`: yes', "a\nb", "- a: b # c", "日本の犬", "x " * 99, "{base}", "a|b \\| c\\", "``` ``", "`",
    "```\n\n# no heading\n---\n", "---", "0o17", "1e5", "~", "yes", "a\u2028b\x1b[31m", "<Gallery />|<b>", "\\`|`",
]  # fmt: skip


def test_a_card_knows_whether_somebody_changed_it(trained) -> None:
    text = card(trained)
    assert is_unchanged(text)
    assert text.startswith("---\n# sd3tune card ")
    for changed in (text + "\n", text.replace("LoRA", "Lora", 1), text[:-1], "", "# My project\n", text[4:]):
        assert not is_unchanged(changed)


@pytest.mark.parametrize("text", NASTY)
def test_any_text_survives_yaml_markdown_shell_and_python(text: str, trained: Trained, quick_config, tmp_path) -> None:
    prior = f"data.sources.0.prior={json.dumps({'prompt': text})}"
    found = about(trained, instance_prompt=text, trigger=text, base=text, encoder_files={"t5": {"file": text}})
    made = card(replace(found, config=quick_config(tmp_path, prior)))
    assert header(made)["instance_prompt"] == text
    assert shlex.split(block(made, "bash"))[-1] == text
    compile(block(made, "python"), "card", "exec")
    assert f"from_pretrained({text!r}, ".replace('"', "'") in block(made, "python").replace('"', "'")
    tokens = body(made)
    headings = [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"]
    assert headings == [
        "quick", "Trigger word", "Use it", "How it was trained", "What was measured", "Limits", "Licence",
    ]  # fmt: skip
    shown = [child.content for token in tokens for child in token.children or () if child.type == "code_inline"]
    printable = "".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text)
    line = re.sub(r"\\(?=\|)", r"\\ ", " ".join(printable.split()))
    assert sum(one == line for one in shown) >= 3  # base, prior and encoder file, in the table
    assert not any(token.type.startswith("html") for token in tokens)
    widths = {sum(token.type == "td_open" for token in row) for row in rows(tokens)}
    assert widths == {2, 3}
    sample = Sample("samples/step-000003-0.png", 3, Drawing(text, 28, 4.5))
    assert header(card(replace(trained, samples=[sample])))["widget"][0]["text"] == text


def test_captions_that_differ_make_no_instance_prompt(trained: Trained) -> None:
    text = card(about(trained, instance_prompt=None))
    assert "instance_prompt" not in header(text)
    assert "None was set, and the captions differ" in text
    assert "`sks`: it is in every caption" in card(about(trained, instance_prompt=None, trigger="sks"))


def test_the_users_own_words_come_first(trained: Trained, quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path, "hub.description='My **dog**, Rex.'")
    assert "# quick\n\nMy **dog**, Rex.\n\nA LoRA adapter for" in card(replace(trained, config=config))


def test_it_is_uploaded_as_it_is_for_that_repository_unless_somebody_changed_it(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    config, described = load_config(run / "config.yaml").config, json.loads((run / "run.json").read_text())
    assert card_of(run, config, read_adapter(run).contract, described, None) == written(run)
    uploaded = card_to_upload(copy, "user/dog").decode()
    assert "sd3tune infer --lora user/dog --config config.yaml --prompt" in uploaded
    assert 'load_lora_weights("user/dog", subfolder="adapter"' in uploaded
    assert "With `config.yaml` of this repository and, beside it, `my-sd3`:" in uploaded
    (copy / "README.md").write_text(written(run) + "\nA good dog.\n")
    assert card_to_upload(copy, "user/dog").decode() == written(run) + "\nA good dog.\n"


def test_a_page_that_is_no_card_as_it_was_made_is_kept(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    config, described = load_config(run / "config.yaml").config, json.loads((run / "run.json").read_text())
    contract, page = read_adapter(run).contract, copy / "README.md"
    assert write_card(copy, config, contract, {**described, "seed": 8}) is None  # of an attempt before
    for text in ("# My project", written(run) + "more", ""):
        page.write_text(text)
        assert "is kept" in (write_card(copy, config, contract, described) or "")
        assert page.read_text() == text
    page.unlink()
    page.symlink_to(run / "README.md")
    assert "is kept" in (write_card(copy, config, contract, described) or "")
    page.unlink()
    page.write_bytes(b"\xff")
    assert "is kept" in (write_card(copy, config, contract, described) or "")
    page.unlink()
    assert write_card(copy, config, contract, described) is None


@pytest.mark.parametrize("odd", [{"report": {"velocity_change": "much"}}, {"timings": 3}, {"images": "\ud800"}])
def test_a_card_that_cannot_be_made_is_a_warning(odd: dict[str, Any], run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run", symlinks=True))
    config, described = load_config(run / "config.yaml").config, json.loads((run / "run.json").read_text())
    (copy / "README.md").unlink()
    line = write_card(copy, config, read_adapter(run).contract, {**described, **odd}) or ""
    assert re.match(r"warning: no model card was written: \w+Error: ", line)
    assert not (copy / "README.md").exists()


def test_a_run_whose_card_cannot_be_made_is_finished(quick_config, tmp_path: Path, capsys) -> None:
    config = quick_config(tmp_path, "train.steps=1")
    hub = config.hub.model_copy(update={"description": "\ud800"})  # which no file of a configuration can say
    run_training(config.model_copy(update={"hub": hub}))
    said = capsys.readouterr().out
    assert "warning: no model card was written: UnicodeEncodeError" in said
    assert "card      " not in said
    assert holds_report(tmp_path)
    assert (tmp_path / "adapter" / ADAPTER_FILE).is_file()
