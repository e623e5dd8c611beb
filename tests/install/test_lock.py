"""requirements.lock: every dependency, on every supported Python and platform, with hashes."""

from __future__ import annotations

import re
import sys
from itertools import product

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.install.lock import LOCK, ROOT, Pin, read_pins

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
PLATFORMS = (("linux", "Linux", "x86_64"), ("linux", "Linux", "aarch64"), ("darwin", "Darwin", "arm64"))


def pins() -> list[Pin]:
    return read_pins(LOCK.read_text(encoding="utf-8"))


def declared() -> list[Requirement]:
    """What pyproject.toml asks for: to run, for every extra, and to build."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = tables["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in (*project["dependencies"], *extras, *tables["build-system"]["requires"])]


def environment(python: str, platform: tuple[str, str, str]) -> dict[str, str]:
    sys_platform, system, machine = platform
    return {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "os_name": "posix",
        "sys_platform": sys_platform,
        "platform_system": system,
        "platform_machine": machine,
    }


@pytest.mark.parametrize(("python", "platform"), product(PYTHONS, PLATFORMS))
def test_every_dependency_has_one_pin_in_its_range(python: str, platform: tuple[str, str, str]) -> None:
    there = environment(python, platform)
    pinned: dict[str, list[str]] = {}
    for pin in pins():
        if pin.applies(there):
            pinned.setdefault(pin.name, []).append(pin.version)
    assert {name: versions for name, versions in pinned.items() if len(versions) > 1} == {}
    outside = [
        str(wanted)
        for wanted in declared()
        if wanted.marker is None or wanted.marker.evaluate(there)
        if not any(wanted.specifier.contains(found) for found in pinned.get(canonicalize_name(wanted.name), []))
    ]
    assert outside == []


def test_every_pin_has_hashes() -> None:
    """And what is built from source, by tools without hashes, is refused."""
    found = pins()
    assert len(found) > 100
    loose = [pin.name for pin in found if not pin.hashes]
    assert loose == []
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", item) for pin in found for item in pin.hashes)
    assert "--only-binary :all:" in LOCK.read_text(encoding="utf-8").splitlines()


def test_the_lock_names_no_index() -> None:
    """So that it works with a mirror."""
    text = LOCK.read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text


def test_constraints_are_the_pins_of_the_lock() -> None:
    constraints = read_pins((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    assert [str(pin.requirement) for pin in constraints] == [str(pin.requirement) for pin in pins()]


def test_the_licences_are_those_of_the_pinned_packages() -> None:
    """`make licences` writes the page."""
    rows = re.findall(
        r"^\| (\S+) \| (.+) \| (.+) \|$", (ROOT / "docs" / "licences.md").read_text("utf-8"), re.MULTILINE
    )
    listed = [(name, version) for name, versions, _ in rows[1:] for version in versions.split(" or ")]
    assert listed == [(pin.name, pin.version) for pin in pins()]
