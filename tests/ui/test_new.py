"""A new run through the page's addresses: photos, captions, configuration."""

from __future__ import annotations

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sd3tune.data.crops import cover_size, crops
from sd3tune.data.images import upright_size
from tests.ui.conftest import OpenPage

SECRET = "the text of another folder"


def photo(path: Path, size: tuple[int, int] = (90, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "teal").save(path)
    return path


def png(size: tuple[int, int] = (40, 40)) -> bytes:
    written = BytesIO()
    Image.new("RGB", size, "red").save(written, "PNG")
    return written.getvalue()


def test_a_photo_is_shown_with_the_crop_of_training(open_page: OpenPage, tmp_path: Path) -> None:
    file = photo(tmp_path / "rex/wide.jpg", (500, 100))
    photo(tmp_path / "rex/tall.png", (100, 130))
    photo(tmp_path / "rex/tall_mask.png", (100, 130))
    (tmp_path / "rex/wide.txt").write_text("<img src=x onerror=alert(1)>")
    (tmp_path / "rex/broken.png").write_bytes(b"no picture")
    answer = open_page(tmp_path).get("/api/photos", params={"folder": "rex", "resolution": 64}).json()
    broken, tall, wide = answer["photos"]
    assert broken["faults"][0].startswith("is not an image")
    assert tall["mask"] == "rex/tall_mask.png"
    assert wide["caption"] == "<img src=x onerror=alert(1)>"
    assert wide["size"] == "500x100"
    target = tuple(map(int, reversed(wide["bucket"].split("x"))))
    (crop,) = crops(upright_size(file), target, 1, False, "0")  # type: ignore[arg-type]
    covered = cover_size((100, 500), target)  # type: ignore[arg-type]
    assert wide["crop"][0] == pytest.approx((crop.box[2] - crop.box[0]) / covered[1], abs=0.01)
    assert wide["crop"][1] == pytest.approx((crop.box[3] - crop.box[1]) / covered[0], abs=0.01)
    assert "loses" in "".join(wide["faults"])
    assert "no caption" in "".join(tall["faults"])


def test_a_caption_is_saved_beside_its_photo_unless_it_changed_meanwhile(open_page: OpenPage, tmp_path: Path) -> None:
    file = photo(tmp_path / "rex/1.jpg")
    page = open_page(tmp_path)

    def save(text: str, former: str) -> tuple[int, dict[str, object]]:
        answer = page.post("/api/photos/caption", json={"path": "rex/1.jpg", "text": text, "former": former})
        return answer.status_code, answer.json()

    assert save("a  dog\n", "") == (200, {"text": "a dog"})
    assert file.with_suffix(".txt").read_text() == "a dog\n"
    status, answer = save("mine", "an older text")
    assert status == 422
    assert "changed meanwhile to 'a dog'" in str(answer["problems"])
    assert save("", "a dog")[0] == 200
    assert not file.with_suffix(".txt").exists()
    assert page.post("/api/photos/caption", json={"path": "rex/no.jpg", "text": "x", "former": ""}).status_code == 422


def test_nothing_outside_the_opened_folder_is_read_or_written(open_page: OpenPage, tmp_path: Path) -> None:
    opened = tmp_path / "opened"
    photo(opened / "rex/1.jpg")
    secret = photo(tmp_path / "secret/2.png")
    (tmp_path / "secret/3.txt").write_text(SECRET)
    (opened / "rex/link.png").symlink_to(secret)
    (opened / "rex/1.txt").symlink_to(tmp_path / "secret/3.txt")
    page = open_page(opened)
    for path in ("../secret/2.png", str(secret), "rex/link.png", "rex/../../secret/2.png"):
        assert page.get("/api/small", params={"path": path}).status_code == 403, path
        assert page.get("/api/picture", params={"path": path}).status_code == 403, path
    assert page.get("/api/photos", params={"folder": "../secret"}).status_code == 403
    assert page.get("/assets/../templates/base.html").status_code == 404
    assert page.get("/assets/%2e%2e/templates/base.html").status_code == 404
    answer = page.post("/api/photos/caption", json={"path": "rex/1.jpg", "text": "x", "former": SECRET})
    assert "a link to a file outside" in answer.text
    assert (tmp_path / "secret/3.txt").read_text() == SECRET
    assert page.get("/api/new/file", params={"file": "../secret/3.txt"}).status_code == 403
    for file in ("rex/1.jpg", "no.yaml"):
        assert page.get("/api/new/file", params={"file": file}).status_code in (403, 422)
    (opened / "x.yaml").write_text(f"data: {{sources: [{{path: {tmp_path / 'secret'}, caption: x}}]}}\n")
    problems = page.get("/api/new/file", params={"file": "x.yaml"}).json()["problems"]
    assert "outside the opened folders" in problems[0]["text"]
    assert page.post("/api/new/start", json={"file": "x.yaml"}).status_code == 422
    (tmp_path / "secret/base.yaml").write_text(SECRET)
    answer = page.post("/api/new/check", json={"file": "x.yaml", "text": "extends: ../secret/base.yaml"})
    assert "outside" in answer.text
    assert SECRET not in answer.text


def test_an_upload_is_a_whole_picture_or_nothing(open_page: OpenPage, tmp_path: Path, monkeypatch) -> None:
    page = open_page(tmp_path)
    folder = page.post("/api/photos/folder", json={"name": "rex"}).json()["folder"]

    def send(name: str, data: bytes) -> int:
        return page.post("/api/photos/upload", params={"folder": folder, "name": name}, content=data).status_code

    assert send("a.png", png()) == 200
    assert send("a.png", png((50, 50))) == 200  # does not replace the first
    assert send("a.txt", b"a caption") == 200
    assert send("evil.html", b"<script>") == 422
    assert send("evil.png", b"<script>alert(1)</script>") == 422
    assert send("../up.png", png()) == 403
    assert send(".hidden.png", png()) == 403
    monkeypatch.setattr("sd3tune.ui.photos.LARGEST_UPLOAD", 100)
    assert send("large.png", png() + bytes(200)) == 422
    assert sorted(path.name for path in (tmp_path / folder).iterdir()) == ["a-2.png", "a.png", "a.txt"]
    assert page.post("/api/photos/folder", json={"name": "../up"}).status_code == 403


def test_only_pictures_are_sent_as_pictures(open_page: OpenPage, tmp_path: Path) -> None:
    photo(tmp_path / "1.png")
    (tmp_path / "page.png").write_text("<script>alert(1)</script>")
    page = open_page(tmp_path)
    answer = page.get("/api/picture", params={"path": "1.png"})
    assert answer.headers["content-type"] == "image/png"
    assert page.get("/api/picture", params={"path": "page.png"}).status_code == 422
    small = page.get("/api/small", params={"path": "1.png", "side": 96})
    with Image.open(BytesIO(small.content)) as image:
        assert (image.format, image.size) == ("WEBP", (90, 60))


def test_a_configuration_is_made_edited_and_checked(open_page: OpenPage, tmp_path: Path) -> None:
    photo(tmp_path / "photos/rex/1.png", (128, 128))
    page = open_page(tmp_path)
    chosen = {"name": "rex", "preset": "dreambooth_sd35_medium", "base": "nano", "photos": "photos/rex"}
    assert page.post("/api/new/create", json={**chosen, "caption": "a sks dog"}).json() == {"file": "rex.yaml"}
    assert "already exists" in page.post("/api/new/create", json={**chosen, "caption": ""}).text
    found = page.get("/api/new/file", params={"file": "rex.yaml"}).json()
    assert found["problems"] == []
    assert found["values"]["model"]["base"] == "nano"
    assert found["values"]["data"]["sources"][0]["path"] == str(tmp_path / "photos/rex")
    assert "path: ./photos/rex" in found["text"]
    edit = {"file": "rex.yaml", "text": found["text"], "path": ["optimizer", "lr"], "raw": "2e-4"}
    edited = page.post("/api/new/edit", json=edit).json()
    assert "lr: 2e-4" in edited["text"]
    wrong = edited["text"].replace("rank: 16", "rnk: 16")
    (problem,) = page.post("/api/new/check", json={"file": "rex.yaml", "text": wrong}).json()["problems"]
    line = next(number for number, text in enumerate(wrong.split("\n"), 1) if "rnk" in text)
    assert (problem["line"], problem["key"]) == (line, "method.rnk")
    assert "did you mean 'rank'" in problem["text"]


def test_photos_get_a_folder_that_exists_and_is_not_another_subjects(open_page: OpenPage, tmp_path: Path) -> None:
    photo(tmp_path / "mine/1.png")
    page = open_page(tmp_path)

    def folder(**asked: str) -> str:
        answer = page.post("/api/photos/folder", json=asked)
        return str(answer.json()["folder"]) if answer.status_code == 200 else str(answer.status_code)

    assert [folder(folder="mine"), folder(folder="photos/dog"), folder(folder="cat")] == [
        "mine", "photos/dog", "photos/cat"
    ]  # fmt: skip
    assert folder() == folder() == "photos/my-photos"  # it is still empty
    photo(tmp_path / "photos/my-photos/1.png")
    assert [folder(), folder(name="dog"), folder(folder="photos/my-photos")] == [
        "photos/my-photos-2", "photos/dog", "photos/my-photos"
    ]  # fmt: skip
    assert [folder(folder=name) for name in ("../up", "photos/.hidden", str(tmp_path.parent / "x"))] == ["403"] * 3


def test_a_removed_photo_is_kept_aside_with_its_files(open_page: OpenPage, tmp_path: Path) -> None:
    for _ in range(2):
        photo(tmp_path / "rex/1.png")
        photo(tmp_path / "rex/1_mask.jpg")  # which would be read as a photo without the photo
        (tmp_path / "rex/1.txt").write_text("a dog")
        (tmp_path / "rex/1.t5.txt").write_text("a dog in the snow")
        photo(tmp_path / "rex/2.png")
        answer = open_page(tmp_path).post("/api/photos/remove", json={"path": "rex/1.png"})
        assert answer.json() == {"folder": "rex/.removed"}
        assert sorted(path.name for path in (tmp_path / "rex").iterdir()) == [".removed", "2.png"]
    found = open_page(tmp_path).get("/api/photos", params={"folder": "rex"}).json()
    assert [one["name"] for one in found["photos"]] == ["2.png"]
    assert len([*(tmp_path / "rex/.removed").iterdir()]) == 8
    photo(tmp_path / "rex/2.jpg")
    (tmp_path / "rex/2.txt").write_text("two dogs")
    open_page(tmp_path).post("/api/photos/remove", json={"path": "rex/2.jpg"})
    assert sorted(path.name for path in (tmp_path / "rex").iterdir()) == [".removed", "2.png", "2.txt"]
    assert open_page(tmp_path).post("/api/photos/remove", json={"path": "rex/1.png"}).status_code == 422


def test_without_a_caption_for_all_each_photo_needs_its_own(open_page: OpenPage, tmp_path: Path) -> None:
    for number in (1, 2):
        photo(tmp_path / f"rex/{number}.png", (64, 64))
    (tmp_path / "rex/1.txt").write_text("a red sks shape")
    page = open_page(tmp_path)
    chosen = {"preset": "dreambooth_sd35_medium", "photos": "rex"}

    def create(**asked: str) -> Any:
        return page.post("/api/new/create", json={**chosen, **asked})

    assert "1 of 2 photos have no caption; write one for all" in create(name="a").text
    assert "no such folder" in create(name="a", photos="nowhere").text
    assert not (tmp_path / "a.yaml").exists()
    (tmp_path / "rex/2.txt").write_text("a blue sks shape")
    expected = {
        "own": ({}, None, ["a red sks shape"]),
        "nano": ({"base": "nano", "caption": "a sks shape"}, "a sks shape", ["a sks shape"]),
        "typed": ({"caption": "a photo of tok cat"}, "a photo of tok cat", ["a photo of tok cat on a beach"]),
    }
    for name, (asked, caption, prompts) in expected.items():
        assert create(name=name, **asked).json() == {"file": f"{name}.yaml"}
        values = page.get("/api/new/file", params={"file": f"{name}.yaml"}).json()["values"]
        assert (values["data"]["sources"][0]["caption"], values["preview"]["prompts"]) == (caption, prompts)
        assert ("licence" in (tmp_path / f"{name}.yaml").read_text()) == (name != "nano")


def test_two_pages_do_not_overwrite_each_others_configuration(open_page: OpenPage, tmp_path: Path) -> None:
    file = tmp_path / "rex.yaml"
    file.write_text("name: a\ndata: {sources: [{path: ., caption: x}]}\n")
    page = open_page(tmp_path)
    former = page.get("/api/new/file", params={"file": "rex.yaml"}).json()["digest"]
    text = file.read_text().replace("name: a", "name: b")
    assert page.post("/api/new/save", json={"file": "rex.yaml", "text": text, "former": former}).status_code == 200
    answer = page.post(
        "/api/new/save", json={"file": "rex.yaml", "text": text.replace("name: b", "name: c"), "former": former}
    )
    assert "changed meanwhile" in answer.text
    wrong = {"file": "rex.yaml", "text": "name: [", "former": former}
    assert page.post("/api/new/save", json=wrong).status_code == 422
    assert file.read_text() == text


def test_a_training_is_queued_once(open_page: OpenPage, tmp_path: Path) -> None:
    photo(tmp_path / "rex/1.png")
    (tmp_path / "rex.yaml").write_text("name: rex\ndata: {sources: [{path: ./rex, caption: x}]}\n")
    page = open_page(tmp_path)
    assert page.get("/api/new/state", params={"file": "rex.yaml"}).json()["job"] is None
    job = page.post("/api/new/start", json={"file": "rex.yaml"}).json()
    assert job["state"] == "queued"
    assert job["command"].endswith("sd3tune train rex.yaml")
    written = json.loads((tmp_path / "runs/.ui" / job["id"] / "command.json").read_text())
    assert written["words"] == ["train", "rex.yaml"]
    assert "queued already" in page.post("/api/new/start", json={"file": "rex.yaml"}).text
    assert page.get("/api/jobs/log", params={"id": job["id"]}).json()["log"] == ""
    assert page.post("/api/jobs/stop", json={"id": job["id"]}).json() == {"state": "removed"}
    assert page.get("/api/jobs").json() == []
    assert page.get("/api/jobs/log", params={"id": job["id"]}).status_code == 404
