"""The Python of the pages runs as it is written, on tiny; that of docs/python.md also in a notebook."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import sd3tune
from sd3tune.config import dump_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "python.md"


def blocks(page: Path) -> list[str]:
    """The page's Python, if it is about this package's API."""
    found = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return found if any("import sd3tune" in block for block in found) else []


@pytest.fixture
def readers_folder(quick_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader has made `rex.yaml`; the base is tiny, and its steps few."""
    monkeypatch.chdir(tmp_path)
    text = dump_config(quick_config(tmp_path / "runs" / "rex", "name=rex", "preview.steps=1", "checkpoint.every=2"))
    Path("rex.yaml").write_text(text)
    return tmp_path


def shorter(code: str) -> str:
    return re.sub(r"train\.steps=\d+", "train.steps=2", code)


@pytest.mark.parametrize(
    "page", [page for page in (ROOT / "README.md", PAGE) if blocks(page)], ids=lambda page: page.name
)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, readers_folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sd3tune.commands.plan.knobs", lambda inputs: [])  # each is another rehearsal
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(shorter(block), str(page), "exec"), names)
    run = names["run"]
    assert isinstance(run, sd3tune.Run)
    assert run.adapter == readers_folder / "runs" / "rex" / "adapter"
    assert (readers_folder / "rex.safetensors").is_file()
    if page == PAGE:
        assert "override trian.steps=5: trian: unknown key; did you mean 'train'?\n" in capsys.readouterr().out
        assert names["losses"].found.keys() == {1, 2}  # type: ignore[attr-defined]
        assert ("result", f"{run}: already finished; nothing to do") in names["log"].messages  # type: ignore[attr-defined]


@pytest.mark.long
def test_a_notebook_shows_the_bars_and_the_run(readers_folder: Path) -> None:
    cells = [block for block in blocks(PAGE) if "load_config(" in block or "callbacks=" in block][:2]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(shorter(cell)) for cell in cells])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(readers_folder)}}).execute()
    outputs = notebook.cells[1].outputs
    printed = "".join(output.get("text", "") for output in outputs)
    run = readers_folder / "runs" / "rex"
    assert f"adapter   {run / 'adapter'}\n" in printed
    assert "rex: 100%" in printed
    assert str(run) in outputs[-1].data["text/html"]
