"""`python -m benchmarks.gpu.bundle OUT`: collect the wheels that a GPU machine without a package index lacks.

They are for Python 3.12 on x86-64 with torch 2.11 and CUDA 13; sd3tune itself is the checkout. Distributions that are
installed there already are not replaced (see `unpacked`).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

WHEELS = (
    "annotated-types==0.8.0",
    "bitsandbytes==0.50.2",
    "certifi==2026.10.18",
    "charset-normalizer==3.5.2",
    "diffusers==0.42.1",
    "idna==3.20",
    "pillow==13.0.0",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "requests==2.34.2",
    "torchao==0.17.0",
    "torchvision==0.26.0",
    "typing-inspection==0.4.5",
    "urllib3==2.8.0",
)
PYTHON = "3.12"
PLATFORMS = ("any", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)), "manylinux2014_x86_64")
CUDA_LIBRARY = "libbitsandbytes_cuda130.so"
LARGEST = 64_000_000
"""Size limit of the folder in bytes."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.bundle", description=__doc__)
    parser.add_argument("out", type=Path, help="the folder to fill")
    out: Path = parser.parse_args(arguments).out
    out.mkdir(parents=True, exist_ok=True)
    if subprocess.run(download_command(out), check=False).returncode:
        print("error: pip could not download the wheels; the line above says which", file=sys.stderr)
        return 1
    for wheel in sorted(out.glob("bitsandbytes-*.whl")):
        strip(wheel, CUDA_LIBRARY)
    total = sum(wheel.stat().st_size for wheel in out.glob("*.whl"))
    if total > LARGEST:
        print(f"error: {out}: {total / 1e6:.1f} MB of wheels, more than {LARGEST / 1e6:.0f} MB", file=sys.stderr)
        return 1
    print(f"{out}: {len(list(out.glob('*.whl')))} wheels, {total / 1e6:.1f} MB")
    return 0


def download_command(out: Path) -> list[str]:
    platforms = [flag for platform in PLATFORMS for flag in ("--platform", platform)]
    abis = [flag for abi in ("cp312", "abi3", "none") for flag in ("--abi", abi)]
    return [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary", ":all:", "--implementation", "cp", "--python-version", PYTHON),
        *(*platforms, *abis, "--dest", str(out), *WHEELS),
    ]


def strip(wheel: Path, library: str) -> None:
    """Keep only bitsandbytes' shared libraries for this CUDA version and for the CPU. Raises RuntimeError."""
    slim = wheel.with_name(f".tmp-{wheel.name}")
    kept = []
    with zipfile.ZipFile(wheel) as full, zipfile.ZipFile(slim, "w", zipfile.ZIP_DEFLATED) as out:
        for member in full.infolist():
            name = Path(member.filename).name
            if name.endswith(".so") and name not in (library, "libbitsandbytes_cpu.so"):
                continue
            kept.append(name)
            out.writestr(member, full.read(member), zipfile.ZIP_DEFLATED)
    if library not in kept:
        slim.unlink()
        raise RuntimeError(f"{wheel}: no {library} inside; is it bitsandbytes for another CUDA version?")
    slim.replace(wheel)


def unpacked(bundle: Path, target: Path) -> Iterator[str]:
    """Unpack the wheels of `bundle` whose distribution is not installed, and yield their names and versions.

    `target` must then be added to the import path.
    """
    for wheel in sorted(bundle.glob("*.whl")):
        distribution, version, *_ = wheel.name.split("-")
        try:
            metadata.version(distribution)
        except metadata.PackageNotFoundError:
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
            yield f"{distribution} {version}"


class NoBundle(Exception):
    """The folder of `--bundle` does not exist."""


@contextlib.contextmanager
def importable(bundle: Path | None) -> Iterator[None]:
    """Put the missing packages of a bundle on the import path, also of child processes. Raises NoBundle."""
    if bundle is None:
        yield
        return
    if not bundle.is_dir():
        raise NoBundle(f"--bundle {bundle}: no such folder; benchmarks.gpu.bundle makes it")
    with tempfile.TemporaryDirectory(prefix="sd3tune-bundle-") as place:
        print("from the bundle:", ", ".join(unpacked(bundle, Path(place))) or "nothing was missing", flush=True)
        sys.path.append(place)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), place)))
        yield


if __name__ == "__main__":
    sys.exit(main())
