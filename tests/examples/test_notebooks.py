"""The notebooks' cells run from top to bottom, on nano, without those that need an account or another machine."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
HERE = """
CHANGES = ["model.base=nano", "model.dtype=fp32", "model.max_sequence_length=16", "data.resolution=64",
           "schedule.warmup_steps=0", "train.steps=3", "train.log_every=1", "preview.steps=2"]
"""
"""What replaces the last line of the settings: the model, and a training of three steps."""


def tags(cell: nbformat.NotebookNode) -> list[str]:
    return list(cell.metadata.get("tags", []))


def code(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_results(path: Path) -> None:
    nbformat.validate(nbformat.read(path, as_version=4))
    assert [cell.outputs or cell.execution_count for cell in code(path) if cell.outputs or cell.execution_count] == []
    assert [tags(cell) for cell in code(path)].count(["parameters"]) == 1
    for cell in code(path):
        if not cell.source.startswith("%"):
            ast.parse(cell.source)


@pytest.fixture
def cells(tmp_path: Path, tiny_images: Path) -> list[nbformat.NotebookNode]:
    """The notebook's cells for nano, without those that need another machine; photos are in a folder beside them."""
    (path,) = NOTEBOOKS
    (tmp_path / "photos").mkdir()
    for photo in tiny_images.glob("*.png"):
        shutil.copy(photo, tmp_path / "photos")
    kept = [cell for cell in code(path) if "not-tested" not in tags(cell)]
    for cell in kept:
        if "parameters" in tags(cell):
            settings, changes = cell.source.rsplit("\n", 1)
            assert changes.startswith("CHANGES = []")
            cell.source = settings + HERE
    return kept


def check_files(folder: Path) -> None:
    assert load_file(folder / "runs" / "rex" / "adapter" / "pytorch_lora_weights.safetensors")
    assert (folder / "rex-comfyui.safetensors").is_file()


def test_the_cells_train_and_draw(cells, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sd3tune.commands.plan.knobs", lambda inputs: [])  # each is another rehearsal
    shown: list[Image.Image] = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    names: dict[str, object] = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell.source, cell.id, "exec"), names)
    check_files(tmp_path)
    assert [picture.size[0] >= 64 for picture in shown] == [True] * 3


@pytest.mark.long  # a kernel of its own
def test_the_notebook_trains_and_draws(cells, tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()
    check_files(tmp_path)
    shown = [output for cell in notebook.cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 3
