"""The files of a run that are uploaded: an explicit list, without paths of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from sd3tune.adapter.names import ADAPTER_FILE, EMBEDDING_FILE
from sd3tune.config import load_config
from sd3tune.config.dump import dump_values
from sd3tune.config.public import public_config, without_paths
from sd3tune.config.run_folder import MARKER, RUN_FILE, read_run_file
from sd3tune.publish.previews import SAMPLES, is_preview

Upload = Mapping[str, Path | bytes]
"""Name in the repository -> local file, or content."""

CARD, CONFIG = "README.md", "config.yaml"
ADAPTERS = ("adapter", "adapter_raw")
MODELS = ("model", "model_raw")
EMBEDDINGS = ("embedding", "embedding_raw")
_SINGLE = {**dict.fromkeys(ADAPTERS, (ADAPTER_FILE, EMBEDDING_FILE)), **dict.fromkeys(EMBEDDINGS, (EMBEDDING_FILE,))}
"""Folder of trained weights -> the files that it may hold."""
_MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
_PUBLIC_FACTS = (
    MARKER, "versions", "seed", "world_size", "device", "gpu", "dtype", "threads", "base", "images", "images_per_epoch",
    "captions", "held_out_images", "class_images", "modules", "git_commit", "resumes", "steps", "timings",
    "shards", "skipped_steps", "stopped_early", "report",
)  # fmt: skip


def files_of_run(run: Path) -> Upload:
    """Return the files that a finished run uploads. Raises UserError if its configuration cannot be read."""
    return {
        **({CARD: run / CARD} if _is_plain_file(run / CARD) else {}),
        CONFIG: config_of_run(run),
        RUN_FILE: (json.dumps(public_facts(read_run_file(run)), indent=2) + "\n").encode(),
        **pictures_of_run(run),
        **files_of_product(run),
    }


def files_of_checkpoint(run: Path, checkpoint: Path) -> Mapping[str, Path]:
    """Return the files that a checkpoint uploads during training, without card and configuration."""
    return {**pictures_of_run(run), **files_of_product(checkpoint)}


def config_of_run(run: Path) -> bytes:
    """Return the public `config.yaml`. Raises UserError if the run's own cannot be read."""
    return dump_values(public_config(load_config(run / CONFIG).config)).encode()


def pictures_of_run(run: Path) -> Mapping[str, Path]:
    """Return the previews drawn so far, recognised by their recipes."""
    return {_in_samples(path): path for path in sorted((run / SAMPLES).glob("*.png")) if _is_own_picture(path)}


def pictures_left_out(run: Path) -> list[str]:
    """Return the names of pictures in the samples folder that the run did not draw."""
    return [_in_samples(path) for path in sorted((run / SAMPLES).glob("*.png")) if not _is_own_picture(path)]


def files_of_product(folder: Path) -> Mapping[str, Path]:
    """Return the trained weights in a run folder or a checkpoint."""
    return {path.relative_to(folder).as_posix(): path for path in _product(folder)}


def is_product_name(path: PurePath) -> bool:
    """Return whether a path, relative to a run folder or checkpoint, is a name that runs give to trained weights."""
    folder, inside = path.parts[0], path.parts[1:]
    if folder in _SINGLE:
        return inside in [(file,) for file in _SINGLE[folder]]
    return folder in MODELS and path.suffix in _MODEL_SUFFIXES


def public_facts(run_facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return the public part of `run.json`: no command line and no library messages, which may hold private data."""
    facts: dict[str, Any] = without_paths({name: run_facts[name] for name in _PUBLIC_FACTS if name in run_facts})
    return facts


def _product(folder: Path) -> Iterator[Path]:
    for name, files in _SINGLE.items():
        yield from (path for file in files if _is_plain_file(path := folder / name / file))
    for name in MODELS:
        for path in sorted((folder / name).rglob("*")):
            if path.suffix in _MODEL_SUFFIXES and _is_plain_file(path):
                yield path


def _in_samples(path: Path) -> str:
    return f"{SAMPLES}/{path.name}"


def _is_own_picture(path: Path) -> bool:
    return _is_plain_file(path) and is_preview(path)


def _is_plain_file(path: Path) -> bool:
    """Return whether a path is a visible, regular file: links may lead anywhere, and hidden files may be incomplete."""
    return path.is_file() and not path.is_symlink() and not path.name.startswith(".")
