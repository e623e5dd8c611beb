"""`data caption`: what is missing is written, what is there is never touched, and a killed command goes on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd3tune.cli.main import app
from sd3tune.commands.data_caption import CaptionRequest, run_data_caption
from sd3tune.commands.data_check import load_data
from sd3tune.data.records import load_records
from sd3tune.errors import DataError, ModelError, RunError, UserError
from sd3tune.files import atomic
from sd3tune.labels.captioner import Answer, Captioner
from tests.forks import FORKS
from tests.labels.small_models import save_captioner
from tests.local_hub import COMMIT, hub

Caption = Callable[..., list[str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("RGB", (96, 64), "red").save(folder / "0.png")
    Image.new("RGB", (48, 80), "blue").save(folder / "1.png")
    Image.radial_gradient("L").crop((0, 0, 200, 100)).save(folder / "2.png")
    return folder


@pytest.fixture
def caption(model: Path, capsys: pytest.CaptureFixture[str]) -> Caption:
    """`caption(folder, **request)` -> the printed lines."""

    def run(folder: Path, dry_run: bool = False, **request: Any) -> list[str]:
        values = {"model": str(model), "trigger": "sks", "subject": "dog", "prompt": "Describe it.", "base": "tiny"}
        run_data_caption(CaptionRequest(folder, **{**values, **request}), dry_run)
        return capsys.readouterr().out.splitlines()

    return run


def texts(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("[!.]*.txt"))}


def test_the_missing_captions_are_written_and_training_reads_them(photos: Path, caption: Caption) -> None:
    (photos / "1.caption").write_text("mine")
    lines = caption(photos)
    written = texts(photos)
    assert list(written) == ["0.txt", "2.txt"]
    for text in written.values():
        assert text.startswith("sks dog, ")
        assert text.count("\n") == 1
    assert written["0.txt"] != written["2.txt"]
    assert "kept      1 photo with a caption: 1.png" in lines
    assert any(line.startswith("to write  2 caption files: ") for line in lines)
    assert any(line.startswith("tokens    CLIP: at most ") and line.endswith(" of 77") for line in lines)
    assert f"wrote 2 captions in {photos}, kept 1" in lines
    assert lines[-2].endswith(f" data check {photos}")
    assert lines[-1].endswith(f" config new mine --data {photos}")
    records = load_records(load_data(str(photos), ["data.trigger=sks"]).config.data)
    assert [record.caption for record in records] == [written["0.txt"][:-1], "sks, mine", written["2.txt"][:-1]]


def test_a_caption_that_exists_in_any_form_stays(photos: Path, caption: Caption) -> None:
    (photos / "0.png.txt").write_text("mine")
    (photos / "1.txt").write_text("")
    (photos / "metadata.jsonl").write_text('{"file_name": "2.png", "text_clip": "short", "text_t5": "long"}\n')
    before = {path: path.stat().st_mtime_ns for path in photos.iterdir()}
    lines = caption(photos)
    assert {path: path.stat().st_mtime_ns for path in photos.iterdir()} == before
    assert any(line.startswith(f"warning: {photos / '1.txt'}: is empty") for line in lines)
    assert f"wrote 0 captions in {photos}, kept 3" in lines


def test_a_file_that_appears_in_the_meantime_is_not_overwritten(
    photos: Path, caption: Caption, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, text: str) -> None:
        atomic.write_text(path, text)
        (photos / "1.txt").write_text("mine")

    monkeypatch.setattr("sd3tune.commands.data_caption.write_text", write)
    lines = caption(photos)
    assert texts(photos)["1.txt"] == "mine"
    assert f"wrote 2 captions in {photos}, kept 0" in lines


def test_photos_of_one_name_get_files_of_their_own(photos: Path, caption: Caption) -> None:
    Image.open(photos / "2.png").save(photos / "0.jpg")
    caption(photos)
    assert set(texts(photos)) == {"0.jpg.txt", "0.png.txt", "1.txt", "2.txt"}
    records = load_records(load_data(str(photos)).config.data)
    assert [record.caption + "\n" for record in records] == list(texts(photos).values())


def test_subfolders_and_another_folder_for_the_files(photos: Path, caption: Caption, tmp_path: Path) -> None:
    inside, out = photos / "more", tmp_path / "out"
    inside.mkdir()
    (photos / "2.png").rename(inside / "2.png")
    (photos / "0.txt").write_text("mine")
    assert any("data.sources.0.recursive=true" in line for line in caption(inside, recursive=True))
    (inside / "2.txt").unlink()
    assert any("1 subfolder with pictures is not read" in line for line in caption(photos, dry_run=True))
    caption(photos, recursive=True, out=out)
    first = texts(out)
    assert list(first) == ["0.txt", "1.txt", "more/2.txt"]
    assert texts(photos) == {"0.txt": "mine"}
    assert f"wrote 0 captions in {out}, kept 3" in caption(photos, recursive=True, out=out, prompt="Say more.")
    assert texts(out) == first


def test_a_photo_is_read_as_training_reads_it(photos: Path, caption: Caption, monkeypatch: pytest.MonkeyPatch) -> None:
    upright = Image.open(photos / "2.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(photos / "2.png", exif=exif)
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(photos / "1.png")
    seen: list[Image.Image] = []
    describe = Captioner.describe

    def watch(self: Captioner, picture: Image.Image, asked: str) -> Answer:
        seen.append(picture)
        return describe(self, picture, asked)

    monkeypatch.setattr(Captioner, "describe", watch)
    caption(photos)
    assert seen[2].size == upright.size
    assert [picture.tobytes() for picture in seen[1:]] == [b"\xff" * 3 * 64 * 64, upright.tobytes()]


def test_an_unreadable_photo_is_named_after_the_others(photos: Path, caption: Caption) -> None:
    data = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError) as caught:
        caption(photos)
    assert [line.partition(": ")[0] for line in caught.value.problems] == [str(photos / "1.png")]
    assert list(texts(photos)) == ["0.txt", "2.txt"]


def test_a_photo_without_description_is_named_and_gets_no_file(
    photos: Path, caption: Caption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd3tune.commands.data_caption.caption_of", lambda *_: None)
    lines = caption(photos)
    assert texts(photos) == {}
    assert any(line.startswith("warning: no description of 3 photos: 0.png, 1.png, 2.png; ") for line in lines)


def test_a_dry_run_loads_and_writes_nothing(photos: Path, caption: Caption) -> None:
    lines = caption(photos, dry_run=True, model="./no/such/model")
    assert lines[-1] == "dry run: ./no/such/model was not loaded, and nothing was written"
    assert texts(photos) == {}


def _killed_while_writing(folder: Path, model: Path) -> None:
    """Caption in a process that is killed within the second file."""
    flush, calls = os.fsync, 0

    def kill(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # two for each file: the file and its folder
            os.kill(os.getpid(), signal.SIGKILL)
        flush(descriptor)

    os.fsync = kill
    run_data_caption(CaptionRequest(folder, model=str(model), trigger="sks", prompt="Describe it.", base="tiny"))


def test_a_killed_command_goes_on_with_the_missing_ones(photos: Path, model: Path, caption: Caption) -> None:
    process = FORKS.Process(target=_killed_while_writing, args=(photos, model))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (first,) = texts(photos)
    assert len(list(photos.glob(".tmp-*"))) == 1
    before = (photos / first).stat().st_mtime_ns
    assert any("kept 1" in line for line in caption(photos, subject=None))
    assert (photos / first).stat().st_mtime_ns == before
    assert len(set(texts(photos).values())) == 3
    uninterrupted = texts(photos)
    for name in uninterrupted:
        (photos / name).unlink()
    caption(photos, subject=None)
    assert texts(photos) == uninterrupted


# What is missing.


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def problem_of(error: pytest.ExceptionInfo[UserError]) -> str:
    (line,) = error.value.problems
    return line


@pytest.mark.usefixtures("empty_cache")
def test_offline_the_model_and_the_way_out_are_named(
    photos: Path, caption: Caption, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as caught:
        caption(photos, model=None)
    line = problem_of(caught)
    assert line.startswith("Qwen/Qwen3-VL-2B-Instruct: not on this machine, and the Hub cannot be reached")
    assert line.endswith("or name a local folder: --model FOLDER")
    with pytest.raises(ModelError, match=r"^\./no: no such folder, and not a valid Hub id$"):
        caption(photos, model="./no")


@pytest.mark.usefixtures("empty_cache")
def test_a_model_of_the_hub_is_downloaded_once(
    photos: Path, model: Path, caption: Caption, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "there" / "small" / "vlm")
    named = f"small/vlm@{COMMIT}"
    with hub(tmp_path / "there") as (endpoint, requests):
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {"ENDPOINT": endpoint, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        caption(photos, model=named)
        assert any("chat_template.jinja" in request for request in requests)
        with pytest.raises(ModelError, match=r"^gated/vlm: this model is gated"):
            caption(photos, model="gated/vlm", out=tmp_path / "out")
    downloaded = texts(photos)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in downloaded:
        (photos / name).unlink()
    caption(photos, model=named)
    assert texts(photos) == downloaded
    for name in downloaded:
        (photos / name).unlink()
    caption(photos)
    assert texts(photos) == downloaded


def test_a_text_that_no_tokenizer_reads_is_named(photos: Path, caption: Caption) -> None:
    with pytest.raises(RunError, match=r"^--trigger: holds half a character"):
        caption(photos, trigger="sks\udce9")
    assert texts(photos) == {}


def test_the_command_line(photos: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "caption", str(photos), "--trigger", "sks", "--subject", "dog", "--model", str(model), "--base"]
    app([*command, "tiny"], standalone_mode=False)
    assert f"wrote 3 captions in {photos}, kept 0" in capsys.readouterr().out
    with pytest.raises(DataError, match="no such folder; name the folder of the photos"):
        app(["data", "caption", str(photos / "no")], standalone_mode=False)
