"""The Dockerfile, as far as it can be tested without Docker: what it copies, installs and starts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.test_docs import ROOT, check_typed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # beside setuptools

PAGE = ROOT / "docs" / "guides" / "docker.md"
TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
STEPS = [
    (step.split(None, 1)[0], step.split(None, 1)[1])
    for step in re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if step.strip()
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def arguments(kind: str) -> list[str]:
    return [text for name, text in STEPS if name == kind]


def copied() -> dict[str, str]:
    """Path in the repository -> path in the image."""
    found = {}
    for step in arguments("COPY"):
        *sources, target = step.split()
        for source in sources:
            found[source] = target + source if target.endswith("/") else target
    return found


def installed_extras() -> set[str]:
    found = re.search(r'"/src\[([a-z,]+)\]"', TEXT)
    assert found
    return set(found[1].split(","))


def test_the_copied_files_exist_and_are_all_that_docker_sees() -> None:
    assert [source for source in copied() if not (ROOT / source).exists()] == []
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == {*copied()}


@pytest.mark.long
def test_the_copied_files_are_enough_to_build_the_package(tmp_path: Path) -> None:
    image = tmp_path / "image"
    for source, target in copied().items():
        place = image / target.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, place, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, place)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "--wheel-dir", str(tmp_path), str(image / "src")], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"sd3tune/cli/main.py", "sd3tune/configs/sd35_medium_t4.yaml", "sd3tune/configs/schema.json"} <= {*names}
    assert any(name.startswith("sd3tune/assets/nano/") for name in names)


def test_every_package_of_the_image_is_pinned() -> None:
    extras = PROJECT["optional-dependencies"]
    assert installed_extras() <= {*extras} - {"dev", "heic"}
    asked = [*PROJECT["dependencies"], "setuptools", *(one for extra in installed_extras() for one in extras[extra])]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}
    assert {canonicalize_name(Requirement(one).name) for one in asked} - pinned == set()
    installs = [line for step in arguments("RUN") for line in step.split("&&") if re.search(r"\bpip install\b", line)]
    assert installs
    assert [line for line in installs if "--constraint /src/constraints.txt" not in line] == []


def test_downloads_stay_out_of_the_image() -> None:
    runs = [step for step in arguments("RUN") if re.search(r"pip install|apt-get install", step)]
    assert len(runs) == 2
    assert [step for step in runs if "--mount=type=cache" not in step] == []


def test_it_starts_as_another_user_than_root_with_a_command_that_exists() -> None:
    names = [name for name, _ in STEPS]
    assert arguments("USER") == ["trainer"]
    assert {*names[names.index("USER") + 1 :]} == {"ENTRYPOINT", "CMD"}
    (program,) = json.loads(arguments("ENTRYPOINT")[0])
    assert program in PROJECT["scripts"]
    (script,) = entry_points(group="console_scripts", name=program)
    assert callable(script.load())
    assert json.loads(arguments("CMD")[0]) == ["--help"]


def test_the_image_holds_no_secret() -> None:
    settings = [text for name, text in STEPS if name in ("ARG", "ENV")]
    assert [text for text in settings if re.search(r"token|secret|password|key", text, flags=re.IGNORECASE)] == []


LINES = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("docker run ")]


@pytest.mark.parametrize("line", LINES)
def test_every_command_on_the_page_is_one_that_the_image_takes(line: str) -> None:
    words = shlex.split(line)
    check_typed(words[words.index("sd3tune") + 1 :])
    assert '-v "$PWD":/work ' in line
    assert arguments("WORKDIR") == ["/work"]


def test_the_page_names_the_extras() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert {extra for extra in installed_extras() if f"`{extra}`" not in text} == set()
