"""Build the null GPU: a stand-in for CUDA's libraries, from `c/*.c` and the headers of the CUDA wheels.

Symbols that torch or bitsandbytes need and the sources lack get a function that does nothing and returns 0.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

from filelock import FileLock

SOURCES = Path(__file__).with_name("c")
CACHE = Path(__file__).parents[2] / "build" / "nullgpu"
LIBRARY = "libcuda.so.1"
"""The stand-in, under the driver's name, by which Triton looks for it."""
_TOOLS = ("gcc", "nm")
_CUDA = r"(?:__cuda|cuda|cu[A-Z]|cublas|cusolver|cusparse|cufft|cufile|cuFile|cupti|nccl)\w*"


class CannotBuild(Exception):
    """Something that the build needs is not on this machine."""


def build() -> Path:
    """Return the folder with the stand-in, built on first use. Raises CannotBuild."""
    include = _include_folders()
    key = hashlib.sha256(metadata.version("torch").encode())
    for source in (Path(__file__), *sorted(SOURCES.iterdir())):
        key.update(source.read_bytes())
    folder = CACHE / key.hexdigest()[:16]
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / "lock"):
        if not (folder / LIBRARY).exists():
            _compile(folder, include)
    return folder


def _include_folders() -> list[Path]:
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise CannotBuild(f"the null GPU is compiled: {', '.join(missing)} is missing")
    torch = _package("torch")
    packages = torch.parent
    if not (torch / "lib" / "libtorch_cuda.so").exists():
        raise CannotBuild("the null GPU stands in for CUDA: this torch is built without it")
    wheels = (
        packages / "nvidia" / "cu13" / "include",
        packages / "nvidia" / "nccl" / "include",
        packages / "triton" / "backends" / "nvidia" / "include",  # has `crt/`, which the first lacks
    )
    headers = [folder for folder in wheels if folder.is_dir()]
    if len(headers) < len(wheels):
        raise CannotBuild("the null GPU needs the headers of torch's wheels for CUDA 13: they are not installed")
    return headers


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise CannotBuild(f"the null GPU needs {name}: it is not installed")
    return Path(spec.origin).parent


def _compile(folder: Path, include: list[Path]) -> None:
    partial = folder.with_name(f"{folder.name}-partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    own = [source for source in sorted(SOURCES.glob("*.c")) if source.stem != "nvml"]
    headers = [flag for path in include for flag in ("-I", str(path))]
    flags = (
        "-O1",
        "-std=gnu11",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wno-unused-parameter",
        "-Wno-builtin-declaration-mismatch",
    )
    first = partial / "written.so"
    _run("gcc", *flags, *headers, "-o", first, *own, "-ldl", "-lpthread", "-lrt")
    lacking = sorted(_wanted() - _symbols(first, "--defined-only"))
    stubs = partial / "stubs.c"
    stubs.write_text("".join(f"long {name}(void) {{ return 0; }}\n" for name in lacking))
    _run("gcc", *flags, "-fno-builtin", *headers, "-o", partial / LIBRARY, *own, stubs, "-ldl", "-lpthread", "-lrt")
    _run("gcc", *flags, "-o", partial / "libnvidia-ml.so.1", SOURCES / "nvml.c")
    partial.rename(folder)


def _wanted() -> set[str]:
    """Return CUDA's symbols that torch and bitsandbytes import."""
    torch = _package("torch") / "lib"
    libraries = [*torch.glob("lib*cuda*.so"), *torch.glob("libtorch_*.so")]
    if importlib.util.find_spec("bitsandbytes"):
        libraries += _package("bitsandbytes").glob("libbitsandbytes_cuda13*.so")
    return set().union(*(_symbols(library, "--undefined-only") for library in libraries))


def _symbols(library: Path, which: str) -> set[str]:
    listed = _run("nm", "-D", "--without-symbol-versions", which, library)
    return set(re.findall(rf"\s[A-Z]\s+({_CUDA})$", listed, flags=re.MULTILINE))


def _run(*command: str | Path) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout
