"""The kinds of source: what may be left out, which paths are paths, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd3tune.config import Config, dump_config, load_config
from sd3tune.config.sections.data import DatasetSource, FolderSource
from sd3tune.errors import ConfigError


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(source: str, *overrides: str, more: str = "") -> Config:
    Path("conf").mkdir(exist_ok=True)
    Path("conf/run.yaml").write_text(f"data: {{sources: [{{{source}}}]{more}}}\n")
    return load_config("conf/run.yaml", overrides).config


def problem(source: str, *overrides: str, more: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load(source, *overrides, more=more)
    (line,) = caught.value.problems
    return line.removeprefix("conf/run.yaml:1: ")


def test_a_source_without_a_kind_is_a_folder() -> None:
    (source,) = load("path: ./dog").data.sources
    assert isinstance(source, FolderSource)
    assert source == load("kind: folder, path: ./dog").data.sources[0]


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("owner/name", "owner/name"),
        ("name", "name"),
        ("./owner/name", "{conf}/owner/name"),
        ("../x", "{conf}/../x"),
        ("train.parquet", "{conf}/train.parquet"),
        ("owner/train-*.parquet", "{conf}/owner/train-*.parquet"),
        ("/data/x", "/data/x"),
        ("here/saved", "{conf}/here/saved"),
    ],
)
def test_a_dataset_is_a_path_or_a_hub_id(written: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "conf" / "here" / "saved").mkdir(parents=True)
    (source,) = load(f"kind: dataset, path: '{written}'").data.sources
    assert isinstance(source, DatasetSource)
    expected = path.format(conf=tmp_path / "conf")
    assert source.path == (str(Path(expected).resolve()) if "{" in path else expected)


def test_the_path_of_a_dataset_in_an_override_is_relative_to_the_working_directory(tmp_path: Path) -> None:
    Path("saved").mkdir()
    (source,) = load("path: x", "data.sources=[{kind: dataset, path: saved}]").data.sources
    assert source.path == str(tmp_path / "saved")


def test_changing_the_kind_drops_what_only_the_former_had() -> None:
    (source,) = load("kind: dataset, path: ./x, split: a, repeats: 2", "data.sources.0.kind=folder").data.sources
    assert isinstance(source, FolderSource)
    assert source.repeats == 2


def test_a_dump_loads_again() -> None:
    config = load("kind: dataset, path: owner/name, split: a, weight: 0.5", more=", trigger: sks")
    Path("again.yaml").write_text(dump_config(config))
    assert load_config("again.yaml").config == config


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("kind: zip, path: x", "data.sources.0.kind: 'zip' is not one of: folder, dataset, webdataset"),
        ("path: x, split: a", "data.sources.0.split: unknown key with kind folder; it belongs to kind dataset"),
        ("kind: dataset, path: x, image: a", "data.sources.0.image: unknown key; did you mean 'image_column'?"),
        ("kind: dataset", "data.sources.0.path: missing; for example `path: ./train.parquet`"),
        ("path: x, weight: 0", "data.sources.0.weight: 0 is too small; must be above 0"),
        ("path: x, max_samples: 0", "data.sources.0.max_samples: 0 is too small; at least 1"),
        ("path: x, template: '{subject}'",
         "data.sources.0.template: '{subject}' has {subject}; the placeholders are {caption} and {trigger}"),
        ("path: x, template: '{caption:>9}'",
         "data.sources.0.template: '{caption:>9}' has {caption:>9}; the placeholders are {caption} and {trigger}"),
        ("path: x, template: '{caption.x}'",
         "data.sources.0.template: '{caption.x}' has {caption.x}; the placeholders are {caption} and {trigger}"),
        ("path: x, template: 'a { brace'",
         "data.sources.0.template: 'a { brace' has a single brace; write {{ or }} for a literal brace"),
        ("path: x, template: 'a {trigger}'",
         "data: sources.0.template has {trigger}, but data.trigger is not set"),
    ],
)  # fmt: skip
def test_what_is_refused(source: str, line: str) -> None:
    assert problem(source) == line


@pytest.mark.parametrize("trigger", ["' sks'", '"sks\\n"', "''"])
def test_a_trigger_is_a_word_or_a_few_on_one_line(trigger: str) -> None:
    assert problem("path: x", more=f", trigger: {trigger}").startswith("data.trigger: ")


@pytest.mark.parametrize("template", ["{trigger}: {caption}", "{{a}} {caption}", "no caption", ""])
def test_templates_that_are_fine(template: str) -> None:
    (source,) = load(f"path: x, template: '{template}'", more=", trigger: sks").data.sources
    assert source.template == template
