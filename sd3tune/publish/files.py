"""What of a run is uploaded: the files on this list and nothing else, and in none of them a path of this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from sd3tune.adapter.file import ADAPTER_FILE
from sd3tune.config import load_config
from sd3tune.config.dump import dump_values
from sd3tune.config.public import public_config, without_paths
from sd3tune.config.run_folder import MARKER, RUN_FILE, read_run_file
from sd3tune.publish.previews import SAMPLES, is_preview

Upload = Mapping[str, Path | bytes]
"""Name in the repository -> the file on this machine, or what to write there instead of it."""

CARD, CONFIG = "README.md", "config.yaml"
ADAPTERS = ("adapter", "adapter_raw")
MODELS = ("model", "model_raw")
_MODEL_SUFFIXES = (".safetensors", ".json", ".txt", ".model")
_PUBLIC_FACTS = (
    MARKER, "versions", "seed", "world_size", "device", "gpu", "dtype", "threads", "base", "images", "images_per_epoch",
    "captions", "held_out_images", "class_images", "modules", "git_commit", "resumes", "timings", "skipped_steps",
    "report",
)  # fmt: skip


def files_of_run(run: Path) -> Upload:
    """All that a finished run uploads. Raises UserError for a configuration that cannot be read."""
    return {
        **({CARD: run / CARD} if _is_plain_file(run / CARD) else {}),
        CONFIG: config_of_run(run),
        RUN_FILE: (json.dumps(public_facts(read_run_file(run)), indent=2) + "\n").encode(),
        **pictures_of_run(run),
        **files_of_product(run),
    }


def files_of_checkpoint(run: Path, checkpoint: Path) -> Mapping[str, Path]:
    """Return the files that a checkpoint of a running training uploads, besides card and configuration."""
    return {**pictures_of_run(run), **files_of_product(checkpoint)}


def config_of_run(run: Path) -> bytes:
    """`config.yaml` for others to see. Raises UserError for one that cannot be read."""
    return dump_values(public_config(load_config(run / CONFIG).config)).encode()


def pictures_of_run(run: Path) -> Mapping[str, Path]:
    """The previews drawn so far, each known by the recipe inside it."""
    return {_in_samples(path): path for path in sorted((run / SAMPLES).glob("*.png")) if _is_own_picture(path)}


def pictures_left_out(run: Path) -> list[str]:
    """The pictures beside the previews, which the run did not draw."""
    return [_in_samples(path) for path in sorted((run / SAMPLES).glob("*.png")) if not _is_own_picture(path)]


def files_of_product(folder: Path) -> Mapping[str, Path]:
    """The trained weights that lie in a run folder or a checkpoint."""
    return {path.relative_to(folder).as_posix(): path for path in _product(folder)}


def is_product_name(path: PurePath) -> bool:
    """Return whether a run gives this name to a trained file; `path` is relative to the run folder or checkpoint."""
    folder, inside = path.parts[0], path.parts[1:]
    return inside == (ADAPTER_FILE,) if folder in ADAPTERS else folder in MODELS and path.suffix in _MODEL_SUFFIXES


def public_facts(run_facts: Mapping[str, Any]) -> dict[str, Any]:
    """`run.json` for others to see. The command line, and what libraries said, can hold anything: they stay here."""
    facts: dict[str, Any] = without_paths({name: run_facts[name] for name in _PUBLIC_FACTS if name in run_facts})
    return facts


def _product(folder: Path) -> Iterator[Path]:
    for name in ADAPTERS:
        if _is_plain_file(folder / name / ADAPTER_FILE):
            yield folder / name / ADAPTER_FILE
    for name in MODELS:
        for path in sorted((folder / name).rglob("*")):
            if path.suffix in _MODEL_SUFFIXES and _is_plain_file(path):
                yield path


def _in_samples(path: Path) -> str:
    return f"{SAMPLES}/{path.name}"


def _is_own_picture(path: Path) -> bool:
    return _is_plain_file(path) and is_preview(path)


def _is_plain_file(path: Path) -> bool:
    """Return whether a path is a visible, regular file: links lead anywhere, hidden files are being written."""
    return path.is_file() and not path.is_symlink() and not path.name.startswith(".")
