"""Uploads through huggingface_hub's real client to a Hub on this machine: what goes up, what comes back, what fails."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageChops
from safetensors.torch import load, load_file, save, save_file

from sd3tune.adapter.derived import write_form
from sd3tune.adapter.embedding import EMBEDDING_FILE, embedding_beside, write_embedding
from sd3tune.adapter.file import ADAPTER_FILE, read_adapter
from sd3tune.adapter.hub import load_adapter, load_embedding
from sd3tune.cli.main import app
from sd3tune.commands.hub_push import run_push
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.config.sections.outputs import HubConfig
from sd3tune.errors import AdapterError, UserError
from sd3tune.inference.job import InferenceJob
from sd3tune.model.base.resolve import resolve_base
from sd3tune.publish import repository
from sd3tune.run.callbacks import uploads as uploading
from sd3tune.training.loop import View
from tests.upload_hub import CUT, CUT_AFTER, READER, WRITER, UploadHub, upload_hub

ADAPTER = "adapter/pytorch_lora_weights.safetensors"
RAW = "adapter_raw/pytorch_lora_weights.safetensors"
PROMPT = "a photo of sks dog"
RUN = (
    "train.steps=3", "checkpoint.every=1", "ema={}", "data.resolution=64",
    "preview={every: 3, prompts: [a photo of sks dog], steps: 1, guidance: 1.0}",
)  # fmt: skip
UPLOADED = {
    "README.md", "config.yaml", "run.json", ADAPTER, RAW,
    "samples/base-0.png", "samples/step-000000-0.png", "samples/step-000003-0.png", "samples/over_time.png",
}  # fmt: skip
COMMIT, PUT, PREUPLOAD = "POST .*/commit/main", "PUT /lfs/", "POST .*/preupload/main"
MakeRun = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """What the environment would set before huggingface_hub is imported; its plain LFS, as only that is served here."""
    with upload_hub() as server:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hf"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", WRITER)
        monkeypatch.setattr(repository, "RETRY_DELAYS", (0.01, 0.01, 0.01))
        yield server


@pytest.fixture(scope="module")
def make_run(quick_config, tiny_images: Path, tmp_path_factory) -> MakeRun:
    """`make_run("hub.push=end", ...)`: the folder of a run on pictures in a place with an odd name."""
    root = tmp_path_factory.mktemp("o'dd, place: #1") / 'pictures of "Rex" ü'
    shutil.copytree(tiny_images, root)

    def make(*overrides: str) -> Path:
        run = tmp_path_factory.mktemp("runs") / "dog"
        run_training(quick_config(run, f"data.sources=[{{path: {json.dumps(str(root))}}}]", *RUN, *overrides))
        return run

    return make


@pytest.fixture(scope="module")
def finished(make_run: MakeRun) -> Path:
    """A run that uploaded nothing. Read only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["/home/someone/bin/sd3tune", "train", "/home/someone/secret/rex.yaml"])
        return make_run()


def assert_nothing_of_the_machine(content: bytes, run: Path) -> None:
    local = {run, *run.parents, Path.cwd(), Path.home(), Path("/home/someone")} - {Path("/")}
    for text in (WRITER, READER, "o'dd", *map(str, local)):
        assert text.encode() not in content, text
    if not content.startswith(b"\x89PNG") and b"__metadata__" not in content:  # bytes may be any short name
        assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", content.decode())


def test_what_is_on_the_list_is_uploaded_and_nothing_of_the_machine(finished: Path, hub: UploadHub, capsys) -> None:
    run_push(finished, "user/dog")
    assert capsys.readouterr().out == f"uploaded  {hub.url}/user/dog\n"
    uploaded = hub.repositories["user/dog"]
    assert uploaded.private
    assert uploaded.files.keys() - {".gitattributes"} == UPLOADED
    assert b"sd3tune infer --lora user/dog --prompt" in uploaded.files["README.md"]
    for name in UPLOADED - {"README.md", "config.yaml", "run.json"}:
        assert uploaded.files[name] == (finished / name).read_bytes()
    for content in uploaded.files.values():
        assert_nothing_of_the_machine(content, finished)
    config = yaml.safe_load(uploaded.files["config.yaml"])
    assert config["data"]["sources"][0]["path"] == 'pictures of "Rex" ü'
    assert config["output_dir"] == "dog"
    ours = json.loads((finished / "run.json").read_text())
    theirs = json.loads(uploaded.files["run.json"])
    assert "/home/someone/secret/rex.yaml" in ours["argv"]
    assert theirs == {name: ours[name] for name in theirs}
    assert theirs.keys() == ours.keys() - {"argv", "optimizer", "warnings"}


def test_a_thumbnail_goes_into_the_uploaded_adapters_alone_and_tags_are_named_first(
    make_run: MakeRun, hub: UploadHub, capsys
) -> None:
    run = make_run("data.export_tags=true")
    ours, sample = (run / ADAPTER).read_bytes(), run / "samples" / "step-000003-0.png"
    capsys.readouterr()
    for again in (False, True):
        run_push(run, "user/dog", sample)
        named, uploaded = capsys.readouterr().out.splitlines()
        assert named.startswith("note: the adapter's metadata holds 5 tags from the captions, for all to read")
        assert uploaded.endswith("is up to date") == again
    theirs = hub.repositories["user/dog"].files
    for name in (ADAPTER, RAW):
        assert b'"modelspec.thumbnail":"data:image/jpeg;base64,' in theirs[name]
        assert {key: value.tolist() for key, value in load(theirs[name]).items()} == {
            key: value.tolist() for key, value in load_file(run / name).items()
        }
    assert (run / ADAPTER).read_bytes() == ours


def test_pictures_that_the_run_did_not_draw_stay_here_and_are_named(
    finished: Path, hub: UploadHub, tmp_path: Path, capsys
) -> None:
    run = shutil.copytree(finished, tmp_path / "dog")
    shutil.copy(run / "samples" / "base-0.png", run / "samples" / "private.png")
    (run / "samples" / "notes.png").write_text("root:x:0:0")
    run_push(run, "user/dog")
    note, uploaded = capsys.readouterr().out.splitlines()
    assert note == ("note: not uploaded: samples/notes.png, samples/private.png: not drawn by this run")
    assert uploaded.startswith("uploaded  ")
    assert hub.repositories["user/dog"].files.keys() - {".gitattributes"} == UPLOADED


def test_a_second_push_uploads_only_what_changed(finished: Path, hub: UploadHub, tmp_path: Path, capsys) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "dog"))
    run_push(run, "user/dog")
    hub.requests.clear()
    run_push(run, "user/dog")
    assert capsys.readouterr().out.endswith("user/dog is up to date\n")
    assert not hub.asked(PUT)
    assert not hub.asked(COMMIT)
    (run / "README.md").write_text((run / "README.md").read_text() + "\nA good dog.\n")
    run_push(run, "user/dog")
    assert not hub.asked(PUT)
    (commit,) = hub.asked(COMMIT)
    lines = [json.loads(line) for line in commit.body.splitlines()]
    assert [line["value"]["path"] for line in lines if line["key"] != "header"] == ["README.md"]


@pytest.mark.parametrize(
    ("line", "status"),
    [
        ("whoami", 503), ("repos/create", CUT), ("repos/create", CUT_AFTER), (PREUPLOAD, 429), (PUT, CUT), (PUT, 500),
        ("POST /verify", 502), (COMMIT, 429), (COMMIT, 503), (COMMIT, CUT), (COMMIT, CUT_AFTER), (COMMIT, 409),
    ],
)  # fmt: skip
def test_what_passes_is_waited_for(line: str, status: int, finished: Path, hub: UploadHub) -> None:
    hub.faults = [(line, status)]
    run_push(finished, "user/dog")
    assert not hub.faults
    assert hub.repositories["user/dog"].files.keys() >= UPLOADED
    assert len(hub.repositories["user/dog"].commits) == 2  # the Hub's own and this


def test_an_upload_that_failed_goes_on_where_it_was(finished: Path, hub: UploadHub) -> None:
    hub.faults = [(COMMIT, 503)] * 4
    with pytest.raises(UserError) as refused:
        run_push(finished, "user/dog")
    assert refused.value.problems == ("user/dog: the Hub answered with HTTP status 503; try again later",)
    large = {(finished / name).read_bytes() for name in UPLOADED if name.endswith((".safetensors", ".png"))}
    assert set(hub.large.values()) == large
    hub.requests.clear()
    run_push(finished, "user/dog")
    assert not hub.asked(PUT)
    assert hub.repositories["user/dog"].files.keys() >= UPLOADED


REFUSALS = [
    ("hf_nobody", "user/dog", "user/dog: the Hub does not accept the token: make one with write access at https://"),
    (READER, "user/dog", "user/dog: the Hub token may only read: make one with write access at https://"),
    (WRITER, "other/dog", "other/dog: the token may not write to other's models: make one"),
    ("", "user/dog", "user/dog: there is no Hub token to upload with: make one with write access at https://"),
]


@pytest.mark.parametrize(("token", "repo_id", "says"), REFUSALS)
def test_a_run_that_cannot_upload_does_not_begin(
    token: str, repo_id: str, says: str, hub: UploadHub, quick_config, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(UserError) as refused:
        run_training(quick_config(tmp_path / "run", f"hub.repo_id={repo_id}", "hub.push=end"))
    (line,) = refused.value.problems
    assert line.startswith(f"hub.push: {says}")
    assert line.endswith("; or set hub.push=never, and `sd3tune hub push` it later")
    assert not (tmp_path / "run").exists()
    assert not hub.repositories


def test_a_dry_run_only_looks(hub: UploadHub, quick_config, tmp_path: Path) -> None:
    run_training(quick_config(tmp_path / "run", "hub.repo_id=user/dog", "hub.push=end"), dry_run=True)
    assert hub.asked("whoami")
    assert all(request.line.startswith(("GET", "HEAD")) for request in hub.requests)
    assert not hub.repositories


def test_checkpoints_are_uploaded_beside_a_training_that_they_do_not_touch(
    finished: Path, make_run: MakeRun, hub: UploadHub, assert_equal_runs, capfd
) -> None:
    """Each as a commit of its own, though all but the newest are pruned, and the one at step 2 is refused for good."""
    hub.faults = [(PREUPLOAD, 429)]
    run = make_run("hub={repo_id: user/dog, push: checkpoint, private: false}", "checkpoint.keep=3")
    assert_equal_runs(finished, run)
    kept = hub.repositories["user/dog"]
    assert not kept.private
    assert [commit.message for commit in kept.commits[1:]] == [
        "quick, step-000001", "quick, step-000002", "dog, trained with sd3tune",
    ]  # fmt: skip
    for commit, folder in zip(kept.commits[1:], ("step-000001", "step-000002", "step-000003"), strict=True):
        expected = load_file(finished / "checkpoints" / folder / ADAPTER)
        assert {name: tensor.tolist() for name, tensor in load(commit.files[ADAPTER]).items()} == {
            name: tensor.tolist() for name, tensor in expected.items()
        }
    for step, commit in enumerate(kept.commits[1:3], 1):
        assert commit.files.keys() - {".gitattributes"} == UPLOADED - {"run.json", RAW, "samples/step-000003-0.png"}
        text = commit.files["README.md"].decode()
        assert f"this is step {step} of 3" in text
        assert "samples/step-000000-0.png" in text
        assert "the first of the pictures above" not in text  # which is that of step 0
    for commit in kept.commits[1:]:
        for content in commit.files.values():
            assert_nothing_of_the_machine(content, run)
        header = yaml.safe_load(commit.files["README.md"].decode().split("---\n")[1])
        assert all(picture["output"]["url"] in commit.files for picture in header["widget"])
    assert kept.files.keys() - {".gitattributes"} == UPLOADED
    assert not list(run.glob(".tmp-*"))
    printed = capfd.readouterr()
    assert f"uploaded  {hub.url}/user/dog" in printed.out
    assert WRITER not in printed.out + printed.err
    assert "signature" not in printed.out + printed.err


def test_a_run_whose_uploads_fail_ends_well_and_is_pushed_later(
    finished: Path, make_run: MakeRun, hub: UploadHub, assert_equal_runs, capfd
) -> None:
    hub.faults = [(COMMIT, 503)] * 99
    run = make_run("hub={repo_id: user/dog, push: checkpoint}", "checkpoint.keep=1")
    printed = capfd.readouterr()
    assert (
        "warning: hub: step-000001 was not uploaded: user/dog: the Hub answered with HTTP status 503"
        in printed.err + printed.out
    )
    assert (
        "warning: hub: the upload is incomplete: user/dog: the Hub answered with HTTP status 503; try again later; the "
        f"run is kept; upload it with: sd3tune hub push {run}" in printed.out
    )
    assert (run / ADAPTER).read_bytes()[8:9] == b"{"
    assert WRITER.encode() not in b"".join(path.read_bytes() for path in run.rglob("*") if path.is_file())
    hub.faults.clear()
    run_push(run, None)
    assert hub.repositories["user/dog"].files.keys() >= UPLOADED
    expected, found = load_file(finished / ADAPTER), load(hub.repositories["user/dog"].files[ADAPTER])
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_a_run_waits_for_no_upload_when_it_is_stopped_and_goes_on_as_ever(
    finished: Path, hub: UploadHub, assert_equal_runs, monkeypatch
) -> None:
    def stop(view: View) -> None:
        if view.step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(uploading, "_STOP_TIMEOUT", 0.1)
    hub.open.clear()
    config = load_config(finished / "config.yaml").config
    push = HubConfig(repo_id="user/dog", push="checkpoint")
    config = config.model_copy(update={"hub": push, "output_dir": f"{finished}-stopped"})
    with pytest.raises(UserError, match="stopped, saved at step-000002; run the same command with --resume"):
        run_training(config, callbacks=[stop])
    assert len(hub.repositories["user/dog"].commits) == 1
    hub.open.set()
    for thread in threading.enumerate():
        if thread.name == "uploads":
            thread.join()  # what the end of the process would have ended
    run_training(config, resume=True)
    assert_equal_runs(finished, Path(f"{finished}-stopped"))
    assert hub.repositories["user/dog"].files.keys() >= UPLOADED
    assert hub.repositories["user/dog"].files[ADAPTER] == Path(f"{finished}-stopped", ADAPTER).read_bytes()


@pytest.mark.parametrize(
    ("prepare", "repo_id", "says"),
    [
        (lambda run: (run / "run.json").unlink(), "user/dog", "not a run folder: it has no run.json of sd3tune"),
        (lambda run: (run / "run.json").write_text('{"sd3tune_run": 1}'), "user/dog", "this run has not finished"),
        (bool, None, "its configuration sets no repository (hub.repo_id); give --repo-id user/name"),
        (bool, "dog", "--repo-id: 'dog' cannot name a repository; write user/name"),
    ],
)
def test_a_push_that_cannot_be_is_one_line(prepare, repo_id, says: str, finished: Path, hub, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "dog"))
    prepare(run)
    with pytest.raises(UserError) as refused:
        run_push(run, repo_id)
    (line,) = refused.value.problems
    assert says in line
    assert not hub.requests


# Drawing with what was uploaded


def drawn(lora: str, out: Path, **options: object) -> Image.Image:
    (path,) = run_infer(
        InferenceJob.from_fields(loras=[lora], prompt=PROMPT, out=out, steps=1, guidance=1.0, before=False, **options)
    )  # type: ignore[arg-type]
    with Image.open(path) as image:
        image.load()
    return image


def same(one: Image.Image, other: Image.Image) -> bool:
    return ImageChops.difference(one, other).getbbox() is None


def test_an_adapter_is_drawn_with_from_the_hub_at_a_revision_and_offline(
    finished: Path, hub: UploadHub, tmp_path: Path, monkeypatch, capsys
) -> None:
    run_push(finished, "user/dog")
    pinned = hub.repositories["user/dog"].commits[-1].id
    expected = drawn(f"{finished}@0.5", tmp_path)
    capsys.readouterr()
    found = drawn("user/dog@0.5", tmp_path)
    assert same(found, expected)
    assert json.loads(found.text["sd3tune"])["loras"][0]["name"] == f"user/dog:{pinned}"  # type: ignore[attr-defined]
    assert f"user/dog:{pinned}: " in capsys.readouterr().out
    assert {request.line.split("/resolve/")[1].split("/", 1)[1] for request in hub.asked("GET .*/resolve/")} == {
        ADAPTER, "README.md",
    }  # fmt: skip

    hub.repositories["user/dog"].commit("another", {ADAPTER: b"broken"})
    assert same(drawn(f"user/dog:{pinned}@0.5", tmp_path), expected)
    with pytest.raises(UserError, match="not a readable safetensors file"):
        drawn("user/dog", tmp_path)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(drawn(f"user/dog:{pinned}@0.5", tmp_path), expected)
    assert not hub.requests
    with pytest.raises(UserError) as refused:
        drawn("user/cat", tmp_path)
    assert refused.value.problems == (
        "--lora user/cat: not on this machine, and the Hub cannot be reached: check the network (and HF_HUB_OFFLINE), "
        "or give --lora a folder",
    )


def test_the_card_in_the_repository_is_run_as_it_stands_from_anywhere(
    make_run: MakeRun, hub: UploadHub, tmp_path: Path, monkeypatch
) -> None:
    """Base and adapter come from the Hub, by what the card says alone."""
    root = resolve_base("tiny").path
    hub.add("user/base", {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    run = make_run("model.base=user/base", "hub={repo_id: user/dog, push: end}")
    files = hub.repositories["user/dog"].files
    card = files["README.md"].decode()
    assert card == (run / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "user/base"
    assert str(run) not in card
    python, bash = (
        re.findall(rf"^```{language}\n(.*?)^```$", card, re.DOTALL | re.M)[0] for language in ("python", "bash")
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    exec(compile(python, "card", "exec"), {})
    app([*shlex.split(bash)[1:], "--no-before"], standalone_mode=False)
    (inferred,) = Path("images").glob("*.png")
    expected = Image.open(io.BytesIO(files["samples/step-000003-0.png"]))
    assert same(Image.open("image.png"), expected)
    assert same(Image.open(inferred), expected)


def test_the_base_of_an_adapter_without_a_contract_comes_from_its_card(
    finished: Path, hub: UploadHub, tmp_path: Path, monkeypatch
) -> None:
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(finished / ADAPTER), plain)
    root = resolve_base("tiny").path
    hub.add("user/base", {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()})
    card = b"---\nbase_model: [user/base]\n---\n# A dog\n"
    hub.add("user/plain", {"README.md": card, "dog.safetensors": plain.read_bytes()})
    expected = drawn(str(plain), tmp_path, base="tiny", size=(64, 64))
    assert same(drawn("user/plain", tmp_path, size=(64, 64)), expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert same(drawn("user/plain", tmp_path, size=(64, 64)), expected)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.add("user/cardless", {"dog.safetensors": plain.read_bytes()})
    with pytest.raises(UserError, match=r"user/cardless:\w{40}: names no base model; give one with --base"):
        drawn("user/cardless", tmp_path)


def test_learned_tokens_come_from_the_hub(hub: UploadHub, finished: Path, tmp_path: Path, monkeypatch) -> None:
    rows = {"clip_l": torch.ones(2, 16), "clip_g": torch.ones(2, 32)}
    word = {"token": "<rex>", "t5_caption": "dog"}
    embedding = write_embedding(tmp_path / "alone", rows, word).read_bytes()
    contract = {**read_adapter(finished).contract, "embedding": {**word, "vectors": 2}}
    write_form(tmp_path / "lora.safetensors", "diffusers", read_adapter(finished).whole(), contract, {})
    hub.add("user/word", {f"embedding/{EMBEDDING_FILE}": embedding})
    hub.add("user/toto", {"toto.safetensors": save(rows)})
    hub.add("user/pivot", {f"adapter/{EMBEDDING_FILE}": embedding,
                           f"adapter/{ADAPTER_FILE}": (tmp_path / "lora.safetensors").read_bytes()})  # fmt: skip
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        found = [load_embedding(Path(f"user/{name}")) for name in ("word", "pivot", "toto")]
        assert [one.token for one in found] == ["<rex>", "<rex>", "toto"]
        assert re.fullmatch(r"user/word:\w{40}", str(found[0].origin))
        beside = embedding_beside(load_adapter(Path("user/pivot")))
        assert beside is not None
        assert torch.equal(beside.rows["clip_l"], rows["clip_l"])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    image = drawn(str(finished), tmp_path / "out", embeddings=["user/word"])
    (used,) = json.loads(image.info["sd3tune"])["embeddings"]
    assert used["name"] == found[0].origin
    (picture,) = (tmp_path / "out").glob("*.png")
    again = run_infer(InferenceJob.from_fields(from_picture=picture, look_in=[finished], out=tmp_path / "again"))
    assert same(Image.open(again[0]), image)
    with pytest.raises(AdapterError, match="--embedding user/none: no such model on the Hub, and no such folder here"):
        load_embedding(Path("user/none"))


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "dog.SAFETENSORS"])
def test_a_folder_of_peft_in_a_repository_is_read_with_its_configuration(
    name: str, finished: Path, hub: UploadHub, tmp_path: Path, monkeypatch
) -> None:
    tensors = load_file(finished / ADAPTER)
    weights = {key.replace("transformer.", "base_model.model.", 1): value for key, value in tensors.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "alpha_pattern": {"to_q": 1}, "use_rslora": True}
    hub.add("user/peft", {"adapter_config.json": json.dumps(config).encode(), name: save(weights)})
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        adapter = load_adapter(Path("user/peft"))
        assert adapter.notes == ()
        assert {alpha for module, alpha in adapter.alphas.items() if module.endswith("to_q")} == {2**0.5}
        assert adapter.alphas["transformer_blocks.0.attn.to_k"] == 6 * 2**0.5


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("user/nothing", "--lora user/nothing: no such model on the Hub, and no such folder here; check the spelling"),
        (
            "user/two",
            "--lora user/two: no pytorch_lora_weights.safetensors in this repository, and none of a.safetensors",
        ),
        ("user/empty", "--lora user/empty: no pytorch_lora_weights.safetensors in this repository, and it holds no"),
        ("user/two:v9", "--lora user/two: the Hub has no revision 'v9' of this model"),
        (
            "user/two:1",
            "--lora user/two: the Hub has no revision '1' of this model; a weight is written user/two@1",
        ),
        (
            "user/two@main",
            "--lora user/two@main: 'main' is not a weight; write PATH@0.8, or for a revision user/name:rev",
        ),
    ],
)
def test_an_adapter_that_the_hub_has_not_is_one_line(lora: str, says: str, hub: UploadHub, tmp_path: Path) -> None:
    hub.add("user/two", {"a.safetensors": b"", "b.safetensors": b""})
    hub.add("user/empty", {"README.md": b"# nothing"})
    with pytest.raises(UserError) as refused:
        drawn(lora, tmp_path)
    (line,) = refused.value.problems
    assert line.startswith(says)


@pytest.mark.long
def test_commands_push_and_find_with_the_environment_of_a_user(finished: Path, tmp_path: Path) -> None:
    """In processes of their own, in which only variables say where the Hub is."""
    with upload_hub() as server:
        environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
        environment["HF_HOME"] = str(tmp_path / "hf")

        def sd3tune(*words: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "sd3tune", *words]
            return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500, check=False)

        server.faults = [(COMMIT, CUT)]
        pushed = sd3tune("hub", "push", str(finished), "--repo-id", "user/dog")
        assert (pushed.returncode, pushed.stdout) == (0, f"uploaded  {server.url}/user/dog\n"), pushed.stderr
        assert WRITER not in pushed.stderr
        assert "signature" not in pushed.stderr
    words = ("--prompt", PROMPT, "--steps", "1", "--no-before", "--out", str(tmp_path / "out"))
    missing = sd3tune("infer", "--lora", "user/dog", *words)  # the server is gone
    assert missing.returncode == 2
    assert "error: --lora user/dog: not on this machine, and the Hub cannot be reached" in missing.stderr
