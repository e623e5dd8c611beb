"""Output that cannot say every character never stops a command: each prints a picture's caption, a path or bars."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sd3tune.cli.main import run
from sd3tune.config import dump_config, load_config

CAPTION = "一只狗 à côté d'un café ▁▄█ \N{DOG FACE}"
ENCODINGS = ("cp1252", "latin-1", "cp932", "ascii")
Printed = Callable[..., str]


@pytest.fixture
def printed(monkeypatch) -> Printed:
    """`printed(encoding, "train", ...)`: what a command prints to a standard output of that encoding."""

    def command(encoding: str, *arguments: object) -> str:
        raw = io.BytesIO()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
            patch.setattr(sys, "argv", ["sd3tune", *map(str, arguments)])
            run()  # SystemExit would be a failure
            sys.stdout.flush()
            return raw.getvalue().decode(encoding)

    return command


@pytest.fixture
def config_file(quick_config, tiny_images: Path, tmp_path: Path, monkeypatch) -> Path:
    folder = Path(shutil.copytree(tiny_images, tmp_path / "图片"))
    for file in folder.glob("*.txt"):
        file.write_text(CAPTION, encoding="utf-8")
    source = f"data.sources=[{{path: {folder}}}]"
    file = tmp_path / "run.yaml"
    file.write_text(dump_config(quick_config(tmp_path / "运行", source, "train.steps=1")), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return file


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_caption_is_printed_as_far_as_it_can_be(encoding: str, config_file: Path, printed: Printed) -> None:
    said = printed(encoding, "data", "check", config_file)
    assert "trainable: 5 images" in said
    assert CAPTION.encode(encoding, "replace").decode(encoding) in said


def test_every_command_prints_what_it_can(config_file: Path, printed: Printed) -> None:
    run_folder = config_file.parent / "运行"
    assert "dry run" in printed("cp1252", "train", config_file, "--dry-run")
    assert "|????" in printed("cp1252", "train", config_file)  # the bars of the change of each block
    assert "already finished" in printed("cp932", "train", config_file, "--resume")
    assert "all reused" in printed("ascii", "cache", config_file)
    assert "entries" in printed("ascii", "cache", "ls", config_file)
    drawn = ("--prompt", CAPTION, "--size", "64", "--steps", "1", "--out", "图", "--no-before")
    assert ".png" in printed("ascii", "infer", "--lora", run_folder, *drawn)
    assert "?" in printed("ascii", "lora", "inspect", run_folder)
    assert "?" in printed("ascii", "data", "convert", "图片", "--to", "csv", "--out", "副本")
    assert "?" in printed("ascii", "config", "new", "dog", "--out", "狗.yaml", "--data", "图片")


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-8", "utf-16"])
def test_a_shown_configuration_loses_no_character(encoding: str, config_file: Path, printed: Printed) -> None:
    """Its escapes are ASCII, so that it loads again from a file that such an output was written to."""
    text = printed(encoding, "config", "show", config_file)
    (config_file.parent / "again.yaml").write_text(text, encoding="utf-8")
    assert load_config(config_file.parent / "again.yaml").config == load_config(config_file).config
    assert text.isascii() == (encoding != "utf-8")


def test_an_output_that_is_no_file_is_left_alone(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys, "argv", ["sd3tune", "--version"])
    run()
    assert sys.stdout.getvalue().startswith("sd3tune ")
