"""The command line: quick to answer, one line per mistake, and what is typed arrives."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd3tune import __version__
from sd3tune.config import dump_config, load_config
from sd3tune.model.base.resolve import resolve_base
from tests.conftest import Command, Finished

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "PIL")


@pytest.fixture
def config_file(quick_config, tmp_path: Path) -> Path:
    file = tmp_path / "dog.yaml"
    file.write_text(dump_config(quick_config(tmp_path / "runs" / "dog", "name=dog", "train.steps=1")))
    return file


def python(*arguments: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=environment, check=False
    )


# Quick.


@pytest.mark.parametrize("arguments", ["--help", "train --help", "infer --help", "--version", "config check {config}"])
def test_what_needs_no_model_imports_none(arguments: str, config_file: Path) -> None:
    """In a fresh interpreter, as this one has imported everything."""
    code = f"""
import sys
from sd3tune.cli.main import run
sys.argv = ["sd3tune", *{arguments.format(config=config_file).split()!r}]
try:
    run()
finally:
    print("imported:", *sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    finished = python("-c", code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "imported:"
    assert len(finished.stdout.splitlines()) > 1


def test_the_check_would_see_an_import() -> None:
    finished = python("-c", f"import sys, PIL.Image; print(sorted(set({HEAVY!r}) & set(sys.modules)))")
    assert finished.stdout.strip() == "['PIL']"


# The ways to start it.


@pytest.mark.parametrize(
    "form", [("-m", "sd3tune"), ("sd3tune",), (ROOT / "sd3tune",)], ids=["module", "folder", "path"]
)
def test_it_starts_as_a_module_and_as_a_folder(form: tuple[object, ...], tmp_path: Path) -> None:
    cwd = ROOT if form == ("sd3tune",) else tmp_path
    finished = python(*form, "--version", cwd=cwd)
    assert finished.stdout == f"sd3tune {__version__}\n"
    assert finished.stderr == ""
    assert finished.returncode == 0


def test_the_folder_that_is_started_is_the_package_that_runs(tmp_path: Path) -> None:
    """Python puts the folder itself on the path, where another sd3tune would be found, and `data` or `config` twice."""
    copy = shutil.copytree(ROOT / "sd3tune", tmp_path / "sd3tune", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "__init__.py").write_text('__version__ = "of the copy"\n')
    assert python("sd3tune", "--version", cwd=tmp_path).stdout == "sd3tune of the copy\n"


def test_an_error_is_one_line_and_exit_code_2_for_a_real_process_too(tmp_path: Path) -> None:
    finished = python("-m", "sd3tune", "train", "nothing.yaml", cwd=tmp_path)
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert finished.stderr.startswith("error: nothing.yaml")
    assert len(finished.stderr.splitlines()) == 1


# Mistakes.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("train {tmp}/nothing.yaml", "nothing.yaml"),
        ("cache {tmp}/nothing.yaml", "nothing.yaml"),
        ("config check {tmp}/nothing.yaml", "nothing.yaml"),
        ("train {config} train.stepz=1", "train.stepz"),
        ("train {config} train.steps=many", "train.steps"),
        ("train {config} method.targets=[attn.to_qq]", "method.targets: 'attn.to_qq' matches no linear module"),
        ("train {config} model.base=tinny", "tinny: no such base"),
        ("train {config} data.sources.0.path={tmp}/none", "none"),
        ("infer --lora {tmp}/nothing --prompt dog", "nothing: no such file or folder"),
        ("infer --lora {config} --prompt dog", "dog.yaml: adapters are read as safetensors only"),
        ("infer --lora x", "give --prompt"),
        ("infer --prompt dog", "give --lora PATH, or --base"),
        ("infer --base tiny --prompt dog --size wide", "--size wide: write a side such as 1024"),
        ("infer --base tiny --prompt dog --size 100", "--size 100x100: both sides must be multiples of 16"),
        ("infer --base tiny --prompt dog --num 0", "--num 0: at least 1"),
        ("infer --base tiny --prompt dog --dtype fp8", "--dtype fp8: one of auto, fp32, bf16, fp16"),
        ("infer --base nope --prompt dog", "nope: no such base"),
        ("cache ls {tmp}", "is not a store of encodings"),
        ("cache prune {tmp}/none.yaml", "none.yaml does not exist"),
        ("data check {tmp}/none", "none: no such folder"),
        ("data convert {tmp}/none --to csv --out {tmp}/out", "none: no such folder"),
        ("data convert {tmp} --to zip --out {tmp}/out", "--to zip: one of sidecar, jsonl, csv, parquet"),
        ("base path tinny", "tinny: not an offline base; one of tiny, "),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: str, said: str, command: Command, config_file: Path, tmp_path: Path
) -> None:
    finished = command(*(word.format(tmp=tmp_path, config=config_file) for word in arguments.split()))
    assert finished.code == 2
    (line,) = finished.err.splitlines()
    assert line.startswith("error: ")
    assert said in line
    assert "Traceback" not in finished.out + finished.err


def test_an_unknown_key_names_file_line_and_what_was_meant(command: Command, config_file: Path) -> None:
    config_file.write_text(config_file.read_text().replace("\nseed: ", "\nsead: 1\nseed: "))
    finished = command("config", "check", config_file)
    number = config_file.read_text().splitlines().index("sead: 1") + 1
    assert finished.code == 2
    assert finished.err.startswith(f"error: {config_file}:{number}: sead: unknown key; did you mean 'seed'?")


def test_several_mistakes_are_a_line_each(command: Command, config_file: Path, tmp_path: Path) -> None:
    finished = command("train", config_file, f"data.sources.0.path={tmp_path}/none", "model.base=tinny")
    assert finished.code == 2
    assert len(finished.err.splitlines()) == 2
    assert all(line.startswith("error: ") for line in finished.err.splitlines())


# What it prints.


def test_version(command: Command) -> None:
    assert command("--version") == Finished(0, f"sd3tune {__version__}\n", "")


def test_help_lists_the_commands_that_there_are(command: Command) -> None:
    said = command("--help").out
    assert all(f" {name} " in said for name in ("demo", "train", "cache", "data", "infer", "config", "base"))


@pytest.mark.parametrize("verb", ["convert", "merge"])
def test_the_forms_in_the_help_are_those_that_can_be_written(verb: str) -> None:
    """Also one that a program registers before it starts the command line."""
    code = f"""
import os, sys
from sd3tune.adapter.layouts import Layout, register_layout
register_layout(Layout("my tool", "mytool_", original=True, flat=True, form="mytool"))
from sd3tune.cli.main import run
sys.argv, os.environ["COLUMNS"] = ["sd3tune", "lora", {verb!r}, "--help"], "200"
run()
"""
    finished = python("-c", code)
    assert finished.returncode == 0, finished.stderr
    assert "mytool, diffusers, kohya, comfyui or lycoris." in finished.stdout


def test_config_show_prints_what_can_be_loaded_again(command: Command, config_file: Path, tmp_path: Path) -> None:
    finished = command("config", "show", config_file, "train.steps=7", "ema.decay=0.5")
    assert finished.code == 0
    (tmp_path / "again.yaml").write_text(finished.out)
    again = load_config(tmp_path / "again.yaml").config
    assert again == load_config(config_file, ["train.steps=7", "ema.decay=0.5"]).config
    assert again.train.steps == 7


def test_config_check_says_that_it_is_valid_and_notes_go_to_stderr(command: Command, config_file: Path) -> None:
    finished = command("config", "check", config_file, "flow.timesteps.kind=uniform")
    assert finished.code == 0
    assert finished.out == f"{config_file}: valid, run 'dog', 1 step\n"
    assert finished.err.startswith("note: ")


def test_config_schema_is_json(command: Command) -> None:
    assert "properties" in json.loads(command("config", "schema").out)


@pytest.mark.parametrize("name", ["tiny", "tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large"])
def test_base_path_prints_a_diffusers_folder(name: str, command: Command) -> None:
    finished = command("base", "path", name)
    assert finished.code == 0
    assert (Path(finished.out.strip()) / "model_index.json").is_file()


def test_cache_takes_a_configuration_or_a_command(
    command: Command, config_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cached = command("cache", config_file, "data.cache_dir=store")
    assert cached.code == 0, cached.err
    assert f"store     {tmp_path / 'store'}" in cached.out
    assert command("cache", "encode", config_file, "data.cache_dir=store").out.count("all reused") == 2
    assert command("cache", "ls", "store").out.splitlines()[-1].startswith("in all")
    assert "add --yes to remove these files" in command("cache", "prune", "store", "--all").out
    assert command("cache", "prune", "store", "--all", "--yes").code == 0
    assert command("cache", "ls", "store").out.endswith("empty\n")
    config_file.rename(tmp_path / "ls")
    assert command("cache", "./ls", "data.cache_dir=store").out.count("all new") == 2


def test_data_check_is_0_for_a_folder_or_a_configuration_that_can_be_trained(
    command: Command, config_file: Path, tiny_images: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for what in (tiny_images, config_file):
        checked = command("data", "check", what, "data.resolution=64", "model.base=tiny")
        assert checked.code == 0, checked.err
        assert checked.out.endswith("trainable: 5 images, 5 per epoch\n")
        assert "sheet     runs/data-check.png" in checked.out
    assert Path("runs/data-check.png").is_file()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("hello")
    checked = command("data", "check", "bad")
    assert checked.code == 2
    assert checked.err.startswith("error: ")


def test_data_check_takes_a_caption_for_a_folder_and_tells_what_was_dropped(
    command: Command, config_file: Path, tiny_images: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bare").mkdir()
    shutil.copy(tiny_images / "0.png", "bare")
    small = ("data.resolution=64", "model.base=tiny")
    assert "has no caption" in command("data", "check", "bare", *small).err
    checked = command("data", "check", "bare", *small, "--caption", "a dog")
    assert (checked.code, "the first: 'a dog'" in checked.out) == (0, True)
    assert command("data", "check", config_file, "--caption", "a dog").err.startswith("error: --caption: ")
    noted = command("data", "check", config_file, *small, "flow.timesteps.kind=uniform")
    assert "note: override flow.timesteps.kind=uniform: dropped flow.timesteps.mean" in noted.err


def test_data_convert_says_what_it_wrote(command: Command, tiny_images: Path, tmp_path: Path) -> None:
    converted = command("data", "convert", tiny_images, "--to", "parquet", "--out", tmp_path / "x.parquet")
    assert converted.out == f"5 images with captions: {tmp_path / 'x.parquet'} (parquet)\n"
    options = ["--split", "train", "--image-column", "image", "--caption-column", "nothing"]
    refused = command("data", "convert", tmp_path / "x.parquet", "--to", "csv", "--out", tmp_path / "y", *options)
    assert refused.code == 2
    assert "has no column 'nothing'; set caption_column: the columns are image, text" in refused.err
    captioned = command("data", "convert", tiny_images, "--to", "csv", "--out", tmp_path / "z", "--caption", "a dog")
    assert captioned.code == 0


def test_a_dry_run_writes_nothing(command: Command, config_file: Path, tmp_path: Path) -> None:
    finished = command("train", config_file, "--dry-run")
    assert finished.code == 0
    assert "dry run: nothing was encoded, trained or written" in finished.out
    assert not (tmp_path / "runs").exists()


def test_train_then_the_command_that_it_prints_then_infer_with_every_option(
    command: Command, config_file: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = command("train", config_file, "optimizer.lr=0.05")
    assert trained.code == 0, trained.err
    words = shlex.split(trained.out.splitlines()[-1])
    assert words[:4] == ["sd3tune", "infer", "--lora", "runs/dog"]

    drawn = command(*words[1:], "--steps", "2")
    assert drawn.code == 0, drawn.err
    files = [Path(line) for line in drawn.out.splitlines() if line.endswith(".png")]
    assert len(files) == 2
    assert all(file.is_file() and file.parent == Path("runs/dog/images") for file in files)

    options = "--negative cat --seed 3 --steps 2 --guidance 2.5 --size 96x64 --num 2 --base tiny-sd3 --dtype bf16"
    drawn = command(
        "infer", "--lora", "runs/dog@0.5", "--lora", "runs/dog", "--prompt", "-n", *options.split(), "--out", "here",
        "--no-before",
    )  # fmt: skip
    assert drawn.code == 0, drawn.err
    files = sorted(Path("here").iterdir())
    assert [file.name for file in files] == ["n-seed3.png", "n-seed4.png"]
    with Image.open(files[1]) as image:
        recipe = json.loads(image.text["sd3tune"])
        assert image.size == (96, 64)
    assert [lora["weight"] for lora in recipe.pop("loras")] == [0.5, 1.0]
    assert recipe == {
        "sd3tune": __version__, "prompt": "-n", "negative": "cat", "seed": 4, "steps": 2, "guidance": 2.5,
        "size": [96, 64], "sampler": "euler", "shift": 3.0, "base": "tiny-sd3", "base_revision": None,
        "base_fingerprint": resolve_base("tiny-sd3").fingerprint("transformer"),
        "max_sequence_length": 16, "encoders": ["clip_l", "clip_g", "t5"], "dtype": "bf16",
    }  # fmt: skip
