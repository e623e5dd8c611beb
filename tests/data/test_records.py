from pathlib import Path

import pytest
from PIL import Image

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.records import load_records, sample_indices, scan_records, written_out
from sd3tune.errors import DataError

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "dreambooth"


def folder_of(path, *names):
    path.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(path / name)
    return path


def config(*sources):
    return DataConfig(sources=[{"kind": "folder", "path": str(path), **more} for path, more in sources], resolution=64)


def problems(*sources):
    with pytest.raises(DataError) as caught:
        load_records(config(*sources))
    return caught.value.problems


def test_a_folder_with_one_caption(tmp_path):
    folder_of(tmp_path / "dog", "b.png", "a.jpg", "c.WEBP")
    records = load_records(config((tmp_path / "dog", {"caption": "a dog", "repeats": 3})))
    assert [record.image.name for record in records] == ["a.jpg", "b.png", "c.WEBP"]
    assert {(record.caption, record.repeats, record.source) for record in records} == {("a dog", 3, 0)}


def test_a_sidecar_wins_over_the_folders_caption(tmp_path):
    folder = folder_of(tmp_path / "dog", "a.png", "b.png")
    (folder / "b.txt").write_text("\ufeff  ein Hund, müde \n", encoding="utf-8")
    records = load_records(config((folder, {"caption": "a dog"})))
    assert [record.caption for record in records] == ["a dog", "ein Hund, müde"]


def test_an_empty_caption_of_the_folder_is_a_caption(tmp_path):
    folder_of(tmp_path / "dog", "a.png")
    assert load_records(config((tmp_path / "dog", {"caption": ""})))[0].caption == ""


def test_other_files_hidden_files_and_subfolders_are_passed_over(tmp_path):
    folder = folder_of(tmp_path / "dog", "a.png", ".b.png")
    folder_of(folder / "more", "c.png")
    folder_of(folder / "folder.png", "d.png")
    (folder / "notes.md").write_text("x")
    (folder / "._a.png").write_bytes(b"resource fork")
    assert [r.image.name for r in load_records(config((folder, {"caption": "x"})))] == ["a.png"]


def test_sources_keep_their_order_and_their_number(tmp_path):
    folder_of(tmp_path / "z", "1.png")
    folder_of(tmp_path / "a", "2.png")
    records = load_records(config((tmp_path / "z", {"caption": "z"}), (tmp_path / "a", {"caption": "a"})))
    assert [(record.source, record.image.name) for record in records] == [(0, "1.png"), (1, "2.png")]


def test_repeats_become_samples(tmp_path):
    folder_of(tmp_path / "a", "1.png", "2.png")
    folder_of(tmp_path / "b", "3.png")
    records = load_records(config((tmp_path / "a", {"caption": "a"}), (tmp_path / "b", {"caption": "b", "repeats": 3})))
    assert sample_indices(records) == [0, 1, 2, 2, 2]


def test_max_samples_chooses_the_same_images_every_time_and_more_contain_fewer(tmp_path):
    folder = folder_of(tmp_path / "dog", *(f"{number:02}.png" for number in range(12)))
    chosen = {
        count: [r.image.name for r in load_records(config((folder, {"caption": "x", "max_samples": count})))]
        for count in (3, 3, 6, 12, 100)
    }
    assert [len(names) for names in chosen.values()] == [3, 6, 12, 12]
    assert chosen[3] != sorted(path.name for path in folder.iterdir())[:3]
    assert set(chosen[3]) < set(chosen[6]) < set(chosen[12])
    assert all(names == sorted(names) for names in chosen.values())


def test_what_max_samples_leaves_out_is_not_looked_at(tmp_path):
    folder = folder_of(tmp_path / "dog", *(f"{number:02}.png" for number in range(12)))
    kept = load_records(config((folder, {"caption": "x", "max_samples": 3})))
    for path in set(folder.iterdir()) - {record.image for record in kept}:
        path.write_text("not an image")
    assert load_records(config((folder, {"caption": "x", "max_samples": 3}))) == kept


@pytest.mark.parametrize(
    ("caption", "template", "trigger", "expected"),
    [
        ("a dog on a beach", None, None, "a dog on a beach"),
        ("a dog on a beach", None, "sks", "sks, a dog on a beach"),
        ("a photo of sks dog", None, "sks", "a photo of sks dog"),
        ("a sksy dog", None, "sks", "sks, a sksy dog"),
        ("", None, "sks", "sks"),
        ("a c++ dog", None, "c++", "a c++ dog"),
        ("a photo of SKS dog", None, "sks", "a photo of SKS dog"),
        ("Rex auf der Straße", None, "STRASSE", "Rex auf der Straße"),
        ("a photo of sks1 dog", None, "sks", "sks, a photo of sks1 dog"),
        ("a photo of sks_dog", None, "sks", "sks, a photo of sks_dog"),
        ("a photo of sks's dog", None, "sks", "a photo of sks's dog"),
        ("the <sks>dog", None, "<sks>", "the <sks>dog"),
        ("小明在海滩上", None, "小明", "小明在海滩上"),
        ("海滩上的小明", None, "小明", "海滩上的小明"),
        ("小红在海滩上", None, "小明", "小明, 小红在海滩上"),
        ("公園のサクラちゃん", None, "サクラ", "公園のサクラちゃん"),
        ("หมาน้ำตาลบนหาด", None, "น้ำตาล", "หมาน้ำตาลบนหาด"),
        ("ຫມາຢູ່ຫາດ", None, "ຢູ່", "ຫມາຢູ່ຫາດ"),
        ("一只sks狗在海滩上", None, "sks", "一只sks狗在海滩上"),
        ("一只sksy狗", None, "sks", "sks, 一只sksy狗"),
        ("철수네 바다", None, "철수", "철수, 철수네 바다"),
        ("un CAFÉ noir", None, "cafe\u0301", "un CAFÉ noir"),
        ("a dog", "{caption}, photo", None, "a dog, photo"),
        ("a dog", "{caption}", "sks", "a dog"),
        ("a dog {trigger}", "a {trigger} photo: {caption} {{1}}", "sks", "a sks photo: a dog {trigger} {1}"),
    ],
)
def test_trigger_and_template(caption, template, trigger, expected):
    assert written_out(caption, template, trigger) == expected


def test_trigger_and_template_are_in_the_records(tmp_path):
    folder_of(tmp_path / "a", "1.png")
    folder_of(tmp_path / "b", "2.png")
    sources = [
        {"kind": "folder", "path": str(tmp_path / "a"), "caption": "a dog"},
        {"kind": "folder", "path": str(tmp_path / "b"), "caption": "a cat", "template": "{caption} ({trigger})"},
    ]
    records = load_records(DataConfig(sources=sources, trigger="sks", resolution=64))
    assert [record.caption for record in records] == ["sks, a dog", "a cat (sks)"]


def test_a_weight_is_in_the_records(tmp_path):
    folder_of(tmp_path / "a", "1.png")
    records = load_records(
        config((tmp_path / "a", {"caption": "x"}), (tmp_path / "a", {"caption": "x", "weight": 0.5}))
    )
    assert [record.weight for record in records] == [1.0, 0.5]


def test_images_without_a_caption_are_seen_by_a_scan(tmp_path):
    folder_of(tmp_path / "a", "1.png", "2.png")
    (tmp_path / "a" / "2.txt").write_text("a dog")
    scan = scan_records(config((tmp_path / "a", {})))
    assert [record.image.name for record in scan.records] == ["1.png", "2.png"]
    (problem,) = scan.problems
    assert "1.png: has no caption" in problem


def test_all_problems_come_at_once_one_line_each(tmp_path):
    folder = folder_of(tmp_path / "dog", "fine.png", "uncaptioned.png")
    (folder / "fine.txt").write_text("a dog")
    (folder / "text.png").write_text("this is text")
    (folder / "nothing.jpg").write_bytes(b"")
    (folder / "blank.txt").write_text(" \n")
    folder_of(folder, "blank.png")
    folder_of(folder, "latin.png")
    (folder / "latin.txt").write_bytes("un chien f\u00e2ch\u00e9".encode("latin-1"))
    empty = folder_of(tmp_path / "empty")
    parent = folder_of(tmp_path / "parent")
    folder_of(parent / "child", "a.png")
    found = problems((folder, {}), (empty, {}), (parent, {}), (tmp_path / "gone", {}), (folder / "fine.png", {}))
    assert all("\n" not in line for line in found)
    expected = {
        "blank.txt": "is empty",
        "latin.txt:1": "byte 0xe2 is not UTF-8",
        "nothing.jpg": "0 bytes",
        "text.png": "not an image",
        "uncaptioned.png": "uncaptioned.txt",
        "empty": "holds no images",
        "parent": str(parent / "child"),
        "gone": "no such folder",
        "fine.png": "is a file",
    }
    assert len(found) == len(expected)
    for line, (name, says) in zip(found, expected.items(), strict=True):
        assert line.split(": ")[0].endswith(f"/{name}")
        assert says in line


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos are not here")
def test_real_photos():
    records = load_records(config((PHOTOS / "dog", {"caption": "a photo of sks dog"})))
    assert [record.image.name for record in records] == [f"{number:02}.jpg" for number in range(5)]
