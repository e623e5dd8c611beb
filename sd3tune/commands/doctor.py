"""`sd3tune doctor`: report the environment, its problems and how to fix them. It writes no files."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import sd3tune
from sd3tune.errors import RunError
from sd3tune.reporting import result
from sd3tune.runtime.environment import gpu_asked_for, launch_problems, no_gpu

PACKAGE = "sd3tune"
BASE_GB = 16
"""Download size of the smallest Stable Diffusion 3 on the Hub in GB, T5 included."""

_GATED = "stabilityai/stable-diffusion-3.5-medium and its siblings"
_DOWNLOADED = "models--stabilityai--stable-diffusion-3*"
_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
_VARIABLES = ("SD3TUNE_CACHE", "HF_HOME", "HF_HUB_CACHE", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE")


@dataclass
class Findings:
    """Report lines and problems; problems are printed at the end, and essential ones are errors."""

    lines: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    essential: list[str] = field(default_factory=list)

    def say(self, topic: str, text: str) -> None:
        self.lines.append(f"{topic:<10}{text}")

    def problem(self, text: str, essential: bool = False) -> None:
        (self.essential if essential else self.problems).append(text)


def run_doctor() -> None:
    """Print the report. Raises RunError when something essential to every command is missing."""
    found = Findings()
    for check in CHECKS:
        check(found)
    result(*found.lines)
    for problem in found.problems:
        result("", f"problem   {problem}")
    if found.essential:
        raise RunError(*found.essential)
    result("", "ready" if not found.problems else "everything else is ready")


def check_versions(found: Findings) -> None:
    """Check Python and the required libraries against the version ranges in sd3tune's metadata."""
    found.say("sd3tune", f"{sd3tune.__version__} in {Path(sd3tune.__file__).parent}")
    try:
        own = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        found.say("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
        found.problem(
            "sd3tune is not installed here, so the versions it needs are unknown: pip install -e . in its folder"
        )
        return
    _check_python(found, own)
    for name, wanted in sorted(_requirements("").items()):
        _check_library(found, name, wanted)


def check_extras(found: Findings) -> None:
    """Check each optional extra, and list its missing libraries."""
    try:
        extras = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    for extra in extras:
        needed = _requirements(extra).keys() - _requirements("").keys()
        missing = sorted(name for name in needed if _version(name) is None)
        state = f"not installed ({', '.join(missing)}): pip install 'sd3tune[{extra}]'" if missing else "installed"
        found.say("extra", f"{extra:<16} {state}")


def check_devices(found: Findings) -> None:
    """List GPUs with memory and precision, CPU cores, and main memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found.say("cpu", f"{cores} cores, {memory / 1e9:.0f} GB of memory")
    if importlib.util.find_spec("torch") is None:
        return  # reported with the versions
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            import torch

            gpus = (
                [_gpu(torch, index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
            )
        except Exception as error:  # a missing or incompatible library can raise anything
            found.problem(f"torch does not load: {_one_line(error)}; install it again: pytorch.org", essential=True)
            return
    for gpu in gpus:
        found.say("gpu", gpu)
    for reason in dict.fromkeys(_one_line(warning.message) for warning in caught):
        found.problem(f"torch warns about the GPU: {reason}")
    if not gpus:
        found.say("gpu", "none that torch can use: `tiny` trains on the CPU, the real bases are too slow there")
        _why_no_gpu(found, torch.version.cuda)
        asked = gpu_asked_for(os.environ)
        if asked:
            found.problem(no_gpu(asked))


def check_hub(found: Findings) -> None:
    """Report if there is a token, without printing it, and if downloads are disabled."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return
    from huggingface_hub import constants, get_token

    if get_token():
        where = "from the environment" if os.environ.get("HF_TOKEN") else f"in {constants.HF_TOKEN_PATH}"
        found.say("token", f"present, {where}; access to gated models is checked at the first download")
    else:
        found.say("token", f"none; needed for {_GATED} (accept the licence on the model page, then `hf auth login`)")
    switched = [flag for flag in _FLAGS if os.environ.get(flag, "").upper() in ("1", "ON", "YES", "TRUE")]
    found.say(
        "offline", f"{', '.join(switched)}: nothing is downloaded" if switched else "no flag set: downloads are allowed"
    )


def check_disks(found: Findings) -> None:
    """Check that the storage folders are writable and have enough free space."""
    for what, folder, needed, remedy in _folders():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        state = "" if folder.exists() else ", not there yet"
        found.say("disk", f"{what:<16} {folder} ({free / 1e9:.0f} GB free{state})")
        if not os.access(existing, os.W_OK):
            found.problem(f"{existing} is not writable, but {what} are stored there; {remedy}")
        elif free < needed * 1e9:
            found.problem(f"{folder}: {free / 1e9:.1f} GB free, and {what} can take {needed} GB; {remedy}")


def check_environment(found: Findings) -> None:
    """List environment variables that affect sd3tune."""
    for name in _VARIABLES:
        if name in os.environ:
            found.say("variable", f"{name}={os.environ[name]}")
    for problem in launch_problems(os.environ):
        found.problem(problem)


CHECKS: tuple[Callable[[Findings], None], ...] = (
    check_versions,
    check_extras,
    check_devices,
    check_hub,
    check_disks,
    check_environment,
)


def _check_python(found: Findings, own: Any) -> None:
    prefix = "Programming Language :: Python :: 3."
    tested = [line.removeprefix(prefix[:-2]) for line in own.get_all("Classifier") or [] if line.startswith(prefix)]
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    remark = "" if version in tested else f"; tested with {' and '.join(tested)}"
    found.say("python", f"{platform.python_version()} on {platform.platform(terse=True)}{remark}")
    if not _inside(platform.python_version(), own["Requires-Python"]):
        found.problem(f"Python {version} is outside {own['Requires-Python']}: use another Python", essential=True)


def _check_library(found: Findings, name: str, wanted: str) -> None:
    version = _version(name)
    if version is None:
        found.say("library", f"{name:<16} missing")
        found.problem(f"{name} is not installed: pip install '{name}{wanted}'", essential=True)
    elif _inside(version, wanted):
        found.say("library", f"{name:<16} {version}")
    else:
        found.say("library", f"{name:<16} {version}, outside {wanted}")
        found.problem(f"{name} {version} is outside the range that sd3tune supports: pip install '{name}{wanted}'")


def _requirements(extra: str) -> dict[str, str]:
    """Return library name -> version range, with an extra; `""` gives the requirements without any extra."""
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires(PACKAGE) or []]
    return {
        one.name: str(one.specifier) for one in wanted if one.marker is None or one.marker.evaluate({"extra": extra})
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _inside(version: str, wanted: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(wanted).contains(version, prereleases=True)


def _gpu(torch: Any, index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    precision = "bf16" if bf16 else "no bf16, so fp16"
    return f"{index}: {properties.name}, {properties.total_memory / 1e9:.1f} GB, {precision}"


def _why_no_gpu(found: Findings, built_for: str | None) -> None:
    if not (Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi")):
        return
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        found.problem("CUDA_VISIBLE_DEVICES hides every GPU: unset it")
    elif built_for is None:
        found.problem(
            "there is an NVIDIA driver, but this torch is built for the CPU: install the CUDA build, pytorch.org"
        )
    else:
        found.problem(
            f"there is an NVIDIA driver, but torch (built for CUDA {built_for}) finds no GPU: does "
            "`nvidia-smi` list one, and is the driver recent enough?"
        )


def _folders() -> Iterator[tuple[str, Path, int, str]]:
    """Yield (contents, folder, required space in GB, remedy when there is less)."""
    home = os.environ.get("SD3TUNE_CACHE")
    if importlib.util.find_spec("huggingface_hub") is not None:
        from huggingface_hub import constants

        hub = Path(constants.HF_HUB_CACHE).absolute()
        needed = 0 if any(hub.glob(_DOWNLOADED)) else BASE_GB
        yield "downloaded bases", hub, needed, "point HF_HOME to another disk"
    bases = Path(home).expanduser() if home else Path.home() / ".cache" / "sd3tune"
    yield "offline bases", bases.absolute() / "bases", 1, "point SD3TUNE_CACHE to another disk"
    store = Path(home).expanduser() / "store" if home else Path(".cache/sd3tune")
    yield "encodings", store.absolute(), 2, "set data.cache_dir, or SD3TUNE_CACHE, to another disk"
    yield "runs", Path("runs").absolute(), 2, "set output_dir to another disk"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
