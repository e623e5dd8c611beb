"""Read requirements.lock: the pinned packages, their markers and hashes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"


@dataclass(frozen=True)
class Pin:
    requirement: Requirement
    hashes: tuple[str, ...]

    @property
    def name(self) -> str:
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        (specifier,) = self.requirement.specifier
        assert specifier.operator == "==", self.requirement
        return specifier.version

    def applies(self, environment: dict[str, str]) -> bool:
        """Return whether the package is installed there; `environment` has the names of PEP 508's markers."""
        return self.requirement.marker is None or self.requirement.marker.evaluate(environment)


def read_pins(text: str) -> list[Pin]:
    """Parse a file of requirements with hashes, continued over lines; comments and options are passed over."""
    pins = []
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith(("#", "-")):
            requirement, *hashes = line.split("--hash=")
            pins.append(Pin(Requirement(requirement), tuple(item.strip() for item in hashes)))
    return pins
