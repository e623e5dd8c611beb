"""Print docs/licences.md: the licences that the installed packages of requirements.lock state in their metadata.

`make licences` runs it.
"""

from __future__ import annotations

from importlib import metadata
from importlib.metadata import PackageNotFoundError

from tests.install.lock import LOCK, read_pins

HEADER = """\
# Licences of the dependencies

<!-- Written by make licences. -->

sd3tune itself is under Apache-2.0. `make setup` installs the packages below, at the versions of `requirements.lock`.
The licence is the one that a package states in its own metadata. CUDA libraries (`nvidia-*`) have NVIDIA's own terms.

| package | version | licence |
|---|---|---|
"""
NOT_INSTALLED = "not installed where this page was written"


def page() -> str:
    versions: dict[str, list[str]] = {}
    for pin in read_pins(LOCK.read_text(encoding="utf-8")):
        versions.setdefault(pin.name, []).append(pin.version)
    rows = [f"| {name} | {' or '.join(pinned)} | {licence(name)} |\n" for name, pinned in versions.items()]
    return HEADER + "".join(rows)


def licence(name: str) -> str:
    """Return a package's licence: its SPDX expression, else its classifiers, else the first line of `License`."""
    try:
        stated = metadata.metadata(name)
    except PackageNotFoundError:
        return NOT_INSTALLED
    classifiers = [item.split(" :: ")[-1] for item in stated.get_all("Classifier", []) if item.startswith("License ::")]
    first_line = (stated.get("License") or "not stated").strip().splitlines()[0]
    return stated.get("License-Expression") or ", ".join(classifiers) or first_line


if __name__ == "__main__":
    print(page(), end="")
