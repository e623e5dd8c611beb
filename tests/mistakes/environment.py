"""What a machine, its disks and its environment can do to a command: cases like those beside, run as real processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sd3tune.model.base.resolve import resolve_base
from tests.local_hub import hub
from tests.mistakes.cases import INFER, TRAIN, Case, edited, parquet, source, steps
from tests.mistakes.process import obey_permissions, small_disk, without_library

Around = Callable[[], AbstractContextManager[Mapping[str, str]]]


@contextlib.contextmanager
def nothing_else() -> Iterator[Mapping[str, str]]:
    yield {}


@contextlib.contextmanager
def a_hub() -> Iterator[Mapping[str, str]]:
    """Whose `gated/sd3` answers 403 and whose `unauthorized/sd3` answers 401, as the real one does."""
    with hub(resolve_base("tiny").path) as (endpoint, _):
        yield {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": os.path.abspath("hf")}


@contextlib.contextmanager
def another_run() -> Iterator[Mapping[str, str]]:
    """Another process holds the lock of the run folder, as a training one does."""
    script = (
        "import sys\nfrom pathlib import Path\nfrom sd3tune.run.folder import locked\n"
        "with locked(Path('runs/mistake')):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        yield {}
        other.kill()


@dataclass(frozen=True)
class ProcessCase(Case):
    """`inside` happens in the process before the command, `around` lasts as long as it and adds to its environment."""

    inside: Callable[[], object] = bool
    around: Around = nothing_else
    new_interpreter: bool = False
    """For what is read when a library is imported."""
    absent: str | None = None
    """A library that a new interpreter does not find."""


def closed(path: str, mode: int = 0) -> Callable[[], object]:
    return lambda: os.chmod(path, mode)


def made(path: str) -> Callable[[], object]:
    return lambda: Path(path).mkdir(parents=True)


def base(name: str) -> Callable[[], object]:
    return edited("base: tiny,", f"base: {name},")


def caption() -> None:
    Path("photos/0.txt").write_text("a")


HALF_A_LAUNCH = {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
DRAW = (*INFER, "--base", "tiny", "--size", "64")
TWO = ("--num-processes", "2")


def one(name: str, command: tuple[str, ...], says: str, *prepare: Callable[[], object], **more: object) -> ProcessCase:
    given = tuple(dict(more.pop("environment", ())).items())  # type: ignore[call-overload]
    return ProcessCase("environment", name, command, says, steps(*prepare), given, **more)  # type: ignore[arg-type]


ENVIRONMENT = [
    one("one of two processes, alone", TRAIN, "WORLD_SIZE=2", environment={"WORLD_SIZE": "2"}),
    one("drawing as one of two processes", DRAW, "WORLD_SIZE=2", environment={"WORLD_SIZE": "2"}),
    one("a rank and no number of processes", TRAIN, "RANK=1", environment={"RANK": "1"}),
    one("an invalid number of processes", TRAIN, "WORLD_SIZE=two", environment={"WORLD_SIZE": "two"}),
    one("the same with --num-processes", (*TRAIN, *TWO), "WORLD_SIZE=two", environment={"WORLD_SIZE": "two"}),
    one("no process at all", TRAIN, "WORLD_SIZE=0", environment={"WORLD_SIZE": "0"}),
    one(
        "an invalid rank",
        TRAIN,
        "RANK=first",
        environment={**HALF_A_LAUNCH, "WORLD_SIZE": "2", "RANK": "first"},
    ),
    one(
        "a rank beyond the processes",
        TRAIN,
        "RANK=5",
        environment={**HALF_A_LAUNCH, "WORLD_SIZE": "2", "RANK": "5"},
    ),
    one("an invalid port", TRAIN, "MASTER_PORT=http", environment={"MASTER_PORT": "http"}),
    one("a GPU that is not there", TRAIN, "CUDA_VISIBLE_DEVICES=97", environment={"CUDA_VISIBLE_DEVICES": "97"}),
    one("drawing on it", DRAW, "CUDA_VISIBLE_DEVICES=97", environment={"CUDA_VISIBLE_DEVICES": "97"}),
    one(
        "two of them",
        (*TRAIN, *TWO),
        "CUDA_VISIBLE_DEVICES=97,98",
        environment={"CUDA_VISIBLE_DEVICES": "97,98"},
    ),
    one(
        "CUDA by accelerate's variable",
        TRAIN,
        "ACCELERATE_TORCH_DEVICE=cuda",
        environment={"ACCELERATE_TORCH_DEVICE": "cuda"},
    ),
    one("neither yes nor no", TRAIN, "ACCELERATE_USE_CPU=maybe", environment={"ACCELERATE_USE_CPU": "maybe"}),
    one("DeepSpeed", TRAIN, "ACCELERATE_USE_DEEPSPEED=true", environment={"ACCELERATE_USE_DEEPSPEED": "true"}),
    one("Megatron-LM", DRAW, "ACCELERATE_USE_MEGATRON_LM=true", environment={"ACCELERATE_USE_MEGATRON_LM": "true"}),
    one("FSDP for two", (*TRAIN, *TWO), "ACCELERATE_USE_FSDP=true", environment={"ACCELERATE_USE_FSDP": "true"}),
    one(
        "a library that is missing",
        TRAIN,
        "'datasets' is not installed",
        parquet("image", "text"),
        source("{kind: dataset, path: ./rows.parquet}"),
        inside=partial(without_library, "datasets"),
    ),
    one(
        "wandb",
        TRAIN,
        "tracking.wandb: wandb is not installed: pip install 'sd3tune[wandb]'",
        edited("train:", "tracking: {wandb: {}}\ntrain:"),
        inside=partial(without_library, "wandb"),
    ),
    one(
        "TensorBoard",
        TRAIN,
        "tracking.tensorboard: tensorboard is not installed: pip install 'sd3tune[tensorboard]'",
        edited("train:", "tracking: {tensorboard: true}\ntrain:"),
        inside=partial(without_library, "tensorboard"),
    ),
    one("one that others look for, too", TRAIN, "'peft' is not installed", new_interpreter=True, absent="peft"),
    one("a gated base", TRAIN, "this model is gated", base("gated/sd3"), around=a_hub, new_interpreter=True),
    one("no token", TRAIN, "`hf auth login`", base("unauthorized/sd3"), around=a_hub, new_interpreter=True),
    one(
        "no network",
        TRAIN,
        "the Hub cannot be reached",
        base("good/sd3"),
        environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "hf"},
        new_interpreter=True,
    ),
    one(
        "an upload without a token",
        (*TRAIN, "hub={repo_id: me/dog, push: end}"),
        "there is no Hub token",
        environment={"HF_HOME": "hf"},
        new_interpreter=True,
    ),
    one(
        "an adapter of the Hub without a network",
        (*INFER, "--lora", "me/dog"),
        "the Hub cannot be reached",
        environment={"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": "hf"},
        new_interpreter=True,
    ),
    one(
        "a cache of downloads that cannot be made",
        TRAIN,
        "HF_HOME",
        base("good/sd3"),
        around=a_hub,
        environment={"HF_HOME": "/proc/hf"},
        new_interpreter=True,
    ),
    one("a cache that is a file", TRAIN, "SD3TUNE_CACHE", environment={"SD3TUNE_CACHE": "photos/0.png"}),
    one("a cache that cannot be made", TRAIN, "SD3TUNE_CACHE", environment={"SD3TUNE_CACHE": "/proc/cache"}),
    one(
        "a cache without room for the base",
        TRAIN,
        "No space left",
        made("full"),
        environment={"SD3TUNE_CACHE": "full"},
        inside=partial(small_disk, "full", "500k"),
    ),
    one(
        "no room for the run",
        (*TRAIN, "method.rank=16"),
        "output_dir",
        made("runs"),
        inside=partial(small_disk, "runs", "64k"),
    ),
    one("no room for encodings", TRAIN, "data.cache_dir", made("store"), inside=partial(small_disk, "store", "8k")),
    one(
        "no room for pictures",
        (*DRAW, "--out", "full"),
        "No space left",
        made("full"),
        inside=partial(small_disk, "full", "8k"),
    ),
    one(
        "runs on a read-only disk",
        TRAIN,
        "output_dir",
        made("runs"),
        inside=partial(small_disk, "runs", "1m", read_only=True),
    ),
    one(
        "a read-only folder for runs", TRAIN, "output_dir", made("runs"), closed("runs", 0o500), inside=obey_permissions
    ),
    one("a read-only store", TRAIN, "data.cache_dir", made("store"), closed("store", 0o500), inside=obey_permissions),
    one("a folder of photos that may not be read", TRAIN, "photos", closed("photos"), inside=obey_permissions),
    one("a photo that may not be read", TRAIN, "0.png", closed("photos/0.png"), inside=obey_permissions),
    one("a caption that may not be read", TRAIN, "0.txt", caption, closed("photos/0.txt"), inside=obey_permissions),
    one("a run folder below a file", (*TRAIN, "output_dir=photos/0.png/run"), "photos/0.png is a file"),
    one("a store that is a file", (*TRAIN, "data.cache_dir=photos/0.png"), "photos/0.png"),
    one("pictures below a file", (*DRAW, "--out", "photos/0.png/x"), "--out"),
    one("a run folder in use", TRAIN, "another process is training here", around=another_run),
]
