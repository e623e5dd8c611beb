"""The shipped presets are found in a checkout and in an installed package, and describe themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sd3tune
from sd3tune.config import load_config
from sd3tune.config.presets import all_presets, find_preset, presets_folder
from sd3tune.errors import ConfigError

ROOT = Path(__file__).parents[2]
CARDS = [f"sd35_medium_{card}" for card in ("12gb", "16gb", "24gb", "48gb", "t4")]


def test_in_a_checkout_they_are_the_files_of_the_repository() -> None:
    assert presets_folder() == ROOT / "configs"
    shipped = set((ROOT / "configs").glob("*.yaml"))
    assert {preset.path for preset in all_presets()} == shipped - set((ROOT / "configs").glob("nano_*.yaml"))


def test_there_is_one_for_each_size_of_card() -> None:
    assert {preset.name for preset in all_presets()} >= set(CARDS)


MEMORY_SETTINGS = {
    "model": {"dtype", "quantize", "t5_device", "t5_quantize"},
    "train": {"gradient_checkpointing", "checkpointed_blocks", "swap_blocks", "memory"},
}


def trained_by(preset: str, *also: str) -> dict:
    """The configuration of a preset without its names, paths and memory settings, and without `also`, such as
    `data.resolution`.
    """
    config = load_config(find_preset(preset)).config.model_dump(exclude={"name", "output_dir", "checkpoint", "preview"})
    for source in config["data"]["sources"]:
        source["path"] = Path(source["path"]).name
    for section, keys in [*MEMORY_SETTINGS.items(), *((where, {key}) for where, key in (of.split(".") for of in also))]:
        config[section] = {key: value for key, value in config[section].items() if key not in keys}
    return config


@pytest.mark.parametrize("card", ["6gb", "16gb", "24gb", "48gb"])
def test_presets_for_cards_differ_in_memory_settings_alone(card: str) -> None:
    assert trained_by(f"sd35_medium_{card}") == trained_by("sd35_medium_12gb")


def test_the_presets_for_a_t4_and_for_large_cards_do_so_too() -> None:
    of_a_t4 = ("data.resolution", "schedule.warmup_steps")
    assert trained_by("sd35_medium_t4", *of_a_t4) == trained_by("sd35_medium_12gb", *of_a_t4)
    large = [trained_by(f"sd35_large_{which}", "data.sources") for which in ("lora", "12gb", "48gb")]
    assert large[0] == large[1] == large[2]
    assert (large[0]["train"]["gradient_accumulation"], large[0]["train"]["max_grad_norm"]) == (8, 0.1)


@pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)
def test_its_description_is_a_line_of_its_own(preset: object) -> None:
    assert preset.description.endswith(".")  # type: ignore[attr-defined]
    assert len(preset.description) <= 100  # type: ignore[attr-defined]


def test_a_name_may_have_its_extension_and_a_wrong_one_gets_a_suggestion() -> None:
    assert find_preset("tiny_smoke.yaml") == find_preset("tiny_smoke") == ROOT / "configs" / "tiny_smoke.yaml"
    with pytest.raises(
        ConfigError, match=r"^no preset is called 'tiny_smok'; did you mean 'tiny_smoke'\? `sd3tune con"
    ):
        find_preset("tiny_smok")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel lays it out: the configurations inside it, nothing beside it."""
    folder = tmp_path_factory.mktemp("site-packages")
    package = Path(sd3tune.__file__).parent
    shutil.copytree(package, folder / "sd3tune", ignore=shutil.ignore_patterns("__pycache__", "configs"))
    shutil.copytree(ROOT / "configs", folder / "sd3tune" / "configs")
    return folder


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sd3tune", *arguments]
    environment = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_an_installed_package_lists_extends_and_copies_them(installed: Path, tmp_path: Path) -> None:
    listed = run(installed, tmp_path, "config", "list")
    assert [line.split()[0] for line in listed.stdout.splitlines()[:-2]] == [preset.name for preset in all_presets()]
    assert listed.stdout.splitlines()[-1] == str(installed / "sd3tune" / "configs")

    made = run(installed, tmp_path, "config", "new", "smoke", "--from", "tiny_smoke")
    assert made.returncode == 0, made.stderr
    assert f"path: {installed / 'sd3tune' / 'assets' / 'demo'} " in (tmp_path / "smoke.yaml").read_text()

    (tmp_path / "run.yaml").write_text("extends: preset:sd35_large_lora\ndata: {sources: [{path: x}]}\n")
    shown = run(installed, tmp_path, "config", "show", "run.yaml")
    assert "base: stabilityai/stable-diffusion-3.5-large" in shown.stdout


def test_an_installation_without_them_says_so(installed: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(installed / "sd3tune", bare / "sd3tune", ignore=shutil.ignore_patterns("configs"))
    listed = run(bare, tmp_path, "config", "list")
    assert listed.returncode == 2
    assert listed.stderr == (
        f"error: {bare / 'sd3tune'}: this installation lacks the shipped configurations; install sd3tune again\n"
    )
