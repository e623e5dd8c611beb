"""Every file in configs/ loads, begins with its command and says why it shifts sigma as it does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd3tune.config import load_config

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))

each_config = pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)


def test_the_promised_files_are_there() -> None:
    promised = {"tiny_smoke", "dreambooth_sd35_medium", "sd3_medium_lora", "sd35_large_lora"}
    assert promised <= {path.stem for path in CONFIGS}


@each_config
def test_it_loads_with_other_photos_and_another_base(path: Path, tmp_path: Path) -> None:
    loaded = load_config(path, ["model.base=tiny", f"data.sources=[{{path: {tmp_path}, caption: a dog}}]"])
    assert loaded.config.model.base == "tiny"
    assert loaded.config.data.sources[0].path == str(tmp_path)
    assert all("a rehearsal: its folder is runs/" in note for note in loaded.notes)


@each_config
def test_it_loads_as_it_is(path: Path) -> None:
    config = load_config(path).config
    assert config.name != "my-lora", "a shipped config has a name of its own, so that runs do not share a folder"
    assert config.preview.prompts


@each_config
def test_it_begins_with_its_command(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith(f"# sd3tune train configs/{path.name}\n")


@each_config
def test_it_states_the_shift_and_why(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^  shift: \d+\.\d+ +# \w.{20,}$", text, flags=re.MULTILINE)
    assert isinstance(load_config(path).config.flow.shift, float)


@each_config
def test_it_states_how_it_is_drawn(path: Path) -> None:
    """Previews, and so `infer`; not left to a default, which can change."""
    assert re.search(r"^  guidance: \d", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert re.search(r"^  steps: \d+\n  guidance:", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


@each_config
def test_a_line_fits_a_screen(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        assert len(line) <= 120, f"{path.name}:{number}"


def test_names_differ_so_that_runs_do_not_share_a_folder() -> None:
    names = [load_config(path).config.name for path in CONFIGS]
    assert len(set(names)) == len(names)
