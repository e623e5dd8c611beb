"""The code of each chapter runs as it is written and makes the picture of its page; so does its notebook."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from nbclient import NotebookClient
from PIL import Image, ImageChops, ImageStat

from examples import course
from examples.course import CHAPTERS, ROOT, main, parts
from tests.test_docs import links

PICTURES = ROOT / "docs" / "images" / "course"
LEARNING = CHAPTERS[7:]
"""Each of these reads the adapters of those before it. In a test they train, and draw, in two steps."""


def run(chapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["course", str(CHAPTERS.index(chapter) + 1), "--out", "."])
    main()


@pytest.mark.parametrize(
    "chapter",
    [*CHAPTERS[:6], pytest.param(CHAPTERS[6], marks=pytest.mark.long)],
    ids=lambda chapter: chapter.stem,
)
def test_the_code_of_a_chapter_makes_its_picture(chapter: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    run(chapter, monkeypatch)
    with Image.open(f"{chapter.stem}.png") as made, Image.open(PICTURES / f"{chapter.stem}.png") as shown:
        assert made.size == shown.size
        assert max(ImageStat.Stat(ImageChops.difference(made, shown)).rms) < 10, "the page shows another picture"


@pytest.mark.long
def test_the_code_of_the_chapters_that_train_runs_in_order(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(course, "parts", lambda page: [re.sub(r"\bsteps=1\d+", "steps=2", one) for one in parts(page)])
    for chapter in LEARNING:
        run(chapter, monkeypatch)
        with Image.open(f"{chapter.stem}.png") as made, Image.open(PICTURES / f"{chapter.stem}.png") as shown:
            assert made.size == shown.size


def test_there_are_ten_chapters_each_with_short_code_one_picture_and_an_exercise() -> None:
    index = list(links(ROOT / "docs" / "course" / "README.md"))
    assert [link for link in index if link[0].isdigit()] == [chapter.name for chapter in CHAPTERS]
    assert [int(chapter.name[:2]) for chapter in CHAPTERS] == [*range(1, 11)]
    for chapter in CHAPTERS:
        before, code, after = parts(chapter)
        assert len(code.splitlines()) < 30, chapter
        assert code.count(f'.save("{chapter.stem}.png")') == 1, chapter
        assert re.findall(r'<img src="([^"]+)', before + after) == [f"../images/course/{chapter.stem}.png"], chapter
        assert re.search(r"^## Exercise\n.+<summary>Answer</summary>", after, re.DOTALL | re.MULTILINE), chapter
        assert (PICTURES / f"{chapter.stem}.png").stat().st_size < 64_000, chapter


def test_a_notebook_runs_and_shows_the_picture(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["course", "--notebooks", "--out", "."])
    main()
    import nbformat

    assert sorted(Path().glob("*.ipynb")) == [Path(f"{chapter.stem}.ipynb") for chapter in CHAPTERS]
    notebook = nbformat.read(f"{CHAPTERS[0].stem}.ipynb", as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert "image/png" in notebook.cells[3].outputs[0].data
    for cell in notebook.cells:
        for link in re.findall(r"\]\((?![a-z]+:|#)([^)#]+)", cell.source):
            assert (tmp_path / link).exists(), link


@pytest.mark.parametrize("number", ["0", "11"])
def test_another_chapter_is_refused(number: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["course", number])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert f"there is no chapter {number}; choose from 1 to 10" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    monkeypatch.setattr(sys, "argv", ["course", "1", "--out", "taken"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert re.search(r"--out: .*taken.*; choose another folder$", capsys.readouterr().err.strip())


def test_a_chapter_that_needs_another_says_so(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(CHAPTERS[8], monkeypatch)
    assert stop.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"chapter 9: .*heart\.safetensors.*; run the chapters before it first$", error), error
    assert list(tmp_path.iterdir()) == []
