"""Runs that have previews, held-out losses or an earlier version's files, for pages that show them."""

from __future__ import annotations

import json
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from sd3tune.commands.train import run_training

EVIL = "</script><img src=x onerror=alert(1)> \"double\" 'single' & `code` {{ 7 * 7 }} 漢字"
COMPAT = Path(__file__).parent / "compat" / "written"


class Page(HTMLParser):
    """The elements of a page with their attributes, the texts of scripts, and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside = ""
        self._words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self._words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self._words.append(data)

    def ids(self) -> set[str | None]:
        return {attributes.get("id") for _, attributes in self.elements}

    def charts(self) -> dict[str, list[str]]:
        """Title of each chart -> labels of its series."""
        found = json.loads(self.scripts[0])
        return {chart["title"]: [one["label"] for one in chart["series"]] for chart in found}


@pytest.fixture(scope="session")
def drawn_run(quick_config, write_images, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with previews and held-out losses, whose prompt and captions hold anything. Read only."""
    folder = tmp_path_factory.mktemp("drawn")
    photos = write_images(folder / "photos", 3)
    (photos / "0.txt").write_text(f"a photo of sks dog {EVIL}", encoding="utf-8")
    prompts = json.dumps([f"a dog {EVIL}", "a cat"])
    settings = ["preview.every=1", "preview.steps=1", "validation={holdout: 1, every: 1}", "train.steps=2"]
    config = quick_config(
        folder / "runs" / "rex", f"data.sources=[{{path: {photos}}}]", f"preview.prompts={prompts}", *settings
    )
    run_training(config)
    return folder / "runs" / "rex"


@pytest.fixture
def copied(drawn_run: Path, tmp_path: Path) -> Path:
    """A copy of `drawn_run` to change."""
    return Path(shutil.copytree(drawn_run, tmp_path / "runs" / "rex"))


@pytest.fixture
def of_earlier_version(tmp_path: Path) -> Path:
    """A run as commit 3cdfac5 wrote it."""
    here = Path(shutil.copytree(COMPAT, tmp_path / "written"))
    for file in here.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml"):
            file.write_text(file.read_text("utf-8").replace("{here}", str(here)), "utf-8")
    return here / "lora"
