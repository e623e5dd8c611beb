"""Where a base model's files are: a tiny offline base, a folder in diffusers' layout, or a Hub id.

Nothing here imports torch, so that a misspelt or gated base is reported at once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sd3tune.errors import ModelError
from sd3tune.model.hub import cached, download

ENCODERS = ("clip_l", "clip_g", "t5")
ENCODER_PARTS = {
    "clip_l": ("tokenizer", "text_encoder"),
    "clip_g": ("tokenizer_2", "text_encoder_2"),
    "t5": ("tokenizer_3", "text_encoder_3"),
}
TINY_SHAPES: dict[str, Literal["sd3", "sd35-medium", "sd35-large"]] = {
    "tiny": "sd35-medium",
    "tiny-sd3": "sd3",
    "tiny-sd35-medium": "sd35-medium",
    "tiny-sd35-large": "sd35-large",
}
TINY_RECIPE = 1  # part of the folder's name: raise it whenever `tiny.py` would write other files

_CONFIG_FILES = {
    "transformer": "config.json",
    "vae": "config.json",
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "text_encoder_3": "config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
    "tokenizer_3": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
}
_TEXT_FILES = ("*.json", "*.txt", "*.model")
_SAMPLE_BYTES = 4096


@dataclass(frozen=True)
class Base:
    """A base model whose root folder is known; the parts of a Hub base are downloaded when asked for."""

    name: str
    """What the user wrote."""
    kind: Literal["tiny", "folder", "hub"]
    path: Path
    """The root of the diffusers folder; for a Hub base, the snapshot in the Hub's own cache."""
    revision: str | None = None
    """The resolved commit of a Hub base."""

    def folder(self, part: str, weights: bool = True) -> Path:
        """The folder of one part (`transformer`, `vae`, `tokenizer_3`, ...), complete on the disk.

        `weights=False` asks for the small text files only. Raises ModelError when the part is missing, or has
        pickled weights only (loading a pickle can run any code, so it is never done).
        """
        if part not in _CONFIG_FILES:
            raise ValueError(f"unknown part {part!r}; one of {', '.join(_CONFIG_FILES)}")
        if self.kind == "hub":
            # Called even when the files seem to be there: an interrupted download may lack some of them.
            heavy = weights and _has_weights(part) and not _are_weights_there(self.path / part)
            download(self.name, self.revision, _hub_patterns(part, weights), progress=heavy)
        folder = self.path / part
        if not (folder / _CONFIG_FILES[part]).is_file():
            way_out = "model.t5=false does without T5" if part.endswith("_3") else "get the whole model again"
            raise ModelError(f"{self.name}: no {part}/{_CONFIG_FILES[part]} in {self.path}: {way_out}")
        if weights and _has_weights(part):
            weight_files(folder)
        return folder

    def fingerprint(self, part: str) -> str:
        """A hex digest of the part's content, independent of path, time, file order and sharding.

        Of each tensor: name, dtype, shape and the first and last 4 KiB; of a part without weights: the text
        files. So it costs some hundred small reads, and an edit in the middle of a large tensor escapes it.
        """
        folder = self.folder(part)
        digest = hashlib.sha256()
        if _has_weights(part):
            texts = [folder / _CONFIG_FILES[part]]
        else:
            texts = sorted(path for pattern in _TEXT_FILES for path in folder.glob(pattern))
        for path in texts:
            _add(digest, path.name.encode(), path.read_bytes())
        for sample in sorted(_tensor_samples(folder)) if _has_weights(part) else ():
            _add(digest, *sample)
        return digest.hexdigest()


def bases_dir() -> Path:
    """Where the tiny bases are kept: `$SD3TUNE_CACHE/bases`, else `~/.cache/sd3tune/bases`."""
    cache = os.environ.get("SD3TUNE_CACHE")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache" / "sd3tune") / "bases"


def resolve_base(name: str, revision: str | None = None) -> Base:
    """Find a base: a tiny base (built on first use), an existing folder, or a Hub id `owner/name`.

    `revision` is a branch, tag or commit of a Hub base; the other kinds have none. Raises ModelError.
    """
    if name in TINY_SHAPES:
        return Base(name, "tiny", _tiny_folder(TINY_SHAPES[name]))
    folder = Path(name).expanduser()
    if folder.is_dir():
        _check_model_index(folder, name)
        return Base(name, "folder", folder.resolve())
    if folder.is_file():
        raise ModelError(f"{name}: a base is a Hub id or a folder in diffusers' layout, and this is a single file")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ModelError(f"{name}: no such base: neither a tiny base, a folder nor a Hub id{_suggestion(folder)}")
    snapshot = download(name, revision, ["model_index.json"])
    _check_model_index(snapshot, name)
    return Base(name, "hub", snapshot, snapshot.name)


def local_base(name: str, revision: str | None = None) -> Base | None:
    """The base as far as it is on this machine, or None; of a Hub base, what was downloaded earlier.

    Raises ModelError for a folder that is no base.
    """
    if name in TINY_SHAPES or Path(name).expanduser().exists():
        return resolve_base(name)
    snapshot = cached(name, revision)
    return None if snapshot is None else Base(name, "folder", snapshot)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that diffusers and transformers load from a part's folder, variants left aside.

    Raises ModelError when there are none, or when a shard named by the index is missing.
    """
    for stem in ("diffusion_pytorch_model", "model"):
        single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        # With both present, transformers ("model") loads the single file and diffusers the shards.
        if index.is_file() and not (stem == "model" and single.is_file()):
            shards = [folder / shard for shard in sorted(set(_read_json(index).get("weight_map", {}).values()))]
            missing = [shard.name for shard in shards if not shard.is_file()]
            if missing or not shards:
                raise ModelError(f"{index}: names weights that are missing: {', '.join(missing) or 'all of them'}")
            return shards
        if single.is_file():
            return [single]
    pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    variants = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if variants:
        hint = f"; {variants[0]} is a variant: give it the plain name, or save the model without a variant"
    elif pickled:
        hint = f"; {pickled[0]} is pickled and is refused, as it can run any code: save it as safetensors"
    else:
        hint = " (pickled ones are never loaded)"
    raise ModelError(f"{folder}: no safetensors weights here{hint}")


def tensor_headers(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> {"dtype", "shape", "data_offsets"} of a safetensors file; offsets count from the file's start.

    Raises ModelError when the file is truncated or is no safetensors file.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size - 8:
                raise ValueError(f"its header wants {length} bytes")
            header: dict[str, dict[str, Any]] = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for tensor in header.values():
            tensor["data_offsets"] = [8 + length + offset for offset in tensor["data_offsets"]]
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=8 + length)
        if end != size:
            raise ValueError(f"its header describes {end} bytes")
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, ValueError) and "its header" in str(error) else "no valid header"
        raise ModelError(
            f"{file}: truncated or not a safetensors file ({size} bytes, {reason}); get the file again"
        ) from None
    return header


def _has_weights(part: str) -> bool:
    return _CONFIG_FILES[part] == "config.json"


def _are_weights_there(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except (ModelError, OSError):
        return False


def _add(digest: Any, *items: bytes) -> None:
    for item in items:
        digest.update(struct.pack("<Q", len(item)) + item)


def _tensor_samples(folder: Path) -> Iterator[tuple[bytes, bytes, bytes]]:
    for file in weight_files(folder):
        with file.open("rb") as stream:
            for name, tensor in tensor_headers(file).items():
                begin, end = tensor["data_offsets"]
                stream.seek(begin)
                head = stream.read(min(_SAMPLE_BYTES, end - begin))
                stream.seek(max(begin, end - _SAMPLE_BYTES))
                tail = stream.read(min(_SAMPLE_BYTES, end - begin))
                yield name.encode(), f"{tensor['dtype']} {tensor['shape']}".encode(), head + tail


def _tiny_folder(shape: Literal["sd3", "sd35-medium", "sd35-large"]) -> Path:
    folder = bases_dir() / f"tiny-{shape}-v{TINY_RECIPE}"
    if not (folder / "model_index.json").is_file():
        from sd3tune.model.tiny import build_tiny

        build_tiny(shape, folder)
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object")
    return content


def _check_model_index(folder: Path, name: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(f"{name}: no model_index.json, so this is no model folder in diffusers' layout")
    pipeline = str(_read_json(index).get("_class_name"))
    if not pipeline.startswith("StableDiffusion3"):
        raise ModelError(f"{name}: a {pipeline}, not a Stable Diffusion 3 or 3.5 model")


def _suggestion(folder: Path) -> str:
    try:
        siblings = [str(folder.parent / path.name) for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        siblings = []
    close = difflib.get_close_matches(str(folder), [*TINY_SHAPES, *siblings], n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; the tiny bases are {', '.join(TINY_SHAPES)}"


def _hub_patterns(part: str, weights: bool) -> list[str]:
    if not _has_weights(part):
        return [f"{part}/{pattern}" for pattern in _TEXT_FILES]
    config = [f"{part}/{_CONFIG_FILES[part]}"]
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    plain = (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")  # no variants such as fp16's
    return config + [f"{part}/{stem}{ending}" for ending in plain] if weights else config
