"""A base model: the files of its parts, their configurations and fingerprints. Nothing here imports torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sd3tune.errors import ModelError
from sd3tune.model.base.contract import CONTRACT_FILE, check_contract, starting_offset
from sd3tune.model.base.hub import download
from sd3tune.model.base.offline import offline_folder, offline_kind
from sd3tune.model.base.part_configs import check_config
from sd3tune.model.base.parts import (
    COMMON,
    CONFIG_FILES,
    ENCODER_OF,
    ENCODER_PARTS,
    LABELS,
    TEXT_FILES,
    VARIANTS,
    has_weights,
)
from sd3tune.model.base.single_file_header import FilePart, misfits, read_checkpoint, read_encoder
from sd3tune.model.base.weights import digest, read_json, refuse_adapter, weight_files

_RANDOM_RECIPE = 1  # increase it whenever `random_weights.py` changes the weights of a seed


@dataclass(frozen=True)
class RandomTransformer:
    """Randomly initialized weights that replace a base's own."""

    config: Mapping[str, Any]
    """The content of diffusers' `config.json`."""
    seed: int


@dataclass(frozen=True)
class Base:
    """A base model with a known root; the parts of a Hub base are downloaded on demand."""

    name: str
    """The name as the user wrote it."""
    kind: Literal["tiny", "nano", "folder", "hub", "file"]
    path: Path
    """The root of the diffusers folder (for a Hub base, the snapshot in the Hub's own cache), or the single file."""
    revision: str | None = None
    """The resolved commit of a Hub base."""
    encoder_files: Mapping[str, Path] = field(default_factory=dict)
    """Encoder (`clip_l`, `clip_g`, `t5`) -> a file that replaces the base's own."""
    tokenizers: str | None = None
    """A folder or Hub id whose tokenizers replace the base's own."""
    random: RandomTransformer | None = None
    """The transformer to train from scratch; all other parts come from the base."""

    @property
    def label(self) -> str:
        """The base's name for publication: only the last component of a local path."""
        return self.path.name if self.kind in ("folder", "file") else self.name

    @property
    def variant(self) -> str | None:
        """The released model (a key of `VARIANTS`) whose shape a single file has; None for any other base."""
        return read_checkpoint(self.path).variant if self.kind == "file" else None

    @property
    def distilled(self) -> bool:
        """True if the base's name, or a name in its files, contains "turbo"; the weights do not show it."""
        if self.random:
            return False
        names = [self.label]
        for file in ("model_index.json", "transformer/config.json") if self.kind != "file" else ():
            if (self.path / file).is_file():
                names.append(str(read_json(self.path / file).get("_name_or_path", "")))
        return any(re.search(r"turbo", name, re.IGNORECASE) for name in names)

    def in_file(self, part: str) -> FilePart | None:
        """Return the location of a part's weights in a single file; None if `folder` has them. Raises ModelError."""
        encoder = ENCODER_OF.get(part)
        if encoder is not None and encoder in self.encoder_files:
            return read_encoder(self.encoder_files[encoder], encoder)
        if self.kind != "file" or not has_weights(part):
            return None
        parts = read_checkpoint(self.path).parts
        file_part = parts.get(encoder or part)
        if file_part is None:
            without = ", or do without T5 (model.t5=false)" if encoder == "t5" else ""
            raise ModelError(
                f"{self.name}: {LABELS[str(encoder)]} is not in this file: "
                f"name the file that holds it in model.text_encoders.{encoder} (for infer: in a --config YAML){without}"
            )
        return file_part

    def folder(self, part: str, weights: bool = True) -> Path:
        """Return the folder of one part (`transformer`, `vae`, `tokenizer_3`, ...), complete on disk.

        `weights=False` covers the small text files only. Raises ModelError if the part is missing, or if its weights
        are only pickled: loading a pickle can run any code, so it is never done.
        """
        if part not in CONFIG_FILES:
            raise ValueError(f"unknown part {part!r}; one of {', '.join(CONFIG_FILES)}")
        if part.startswith("tokenizer") and (self.tokenizers or self.kind == "file"):
            return self._tokenizer(part)
        if self.kind == "file":
            return COMMON / part
        if self.kind == "hub":
            # Called even if the files seem complete: an interrupted download may lack some of them.
            heavy = weights and has_weights(part) and not _are_weights_there(self.path / part)
            download(self.name, self.revision, hub_patterns(part, weights), progress=heavy)
        folder = self.path / part
        if not (folder / CONFIG_FILES[part]).is_file():
            hint = "model.t5=false does without T5" if part.endswith("_3") else "get the whole model again"
            raise ModelError(f"{self.name}: no {part}/{CONFIG_FILES[part]} in {self.path}: {hint}")
        refuse_adapter(folder)
        if weights and has_weights(part):
            weight_files(folder)
        return folder

    def config(self, part: str) -> dict[str, Any]:
        """Return the checked configuration of a part, without reading or downloading weights. Raises ModelError."""
        if part == "transformer" and self.random:
            return dict(self.random.config)
        file_part = self.in_file(part)
        if file_part:
            check_config(f"{file_part.file}: the shapes of its tensors", part, file_part.config)
            return dict(file_part.config)
        file = self.folder(part, weights=False) / CONFIG_FILES[part]
        config = read_json(file)
        check_config(str(file), part, config)
        return config

    @property
    def ignores_projection(self) -> bool:
        """True if CLIP-L comes from a file with a `text_projection`, which Stable Diffusion 3 does not use."""
        file_part = self.in_file(ENCODER_PARTS["clip_l"][1])
        return bool(file_part and file_part.unused)

    def fingerprint(self, part: str, uses_all: bool = False) -> str:
        """Return a hex digest of the used content of a part (see `weights.digest`), independent of its location.

        It covers the config and the tensors, or the text files of a part without weights. `uses_all` returns the digest
        of earlier versions, which included `FilePart.unused`.
        """
        if part == "transformer" and self.random:
            recipe = {"recipe": _RANDOM_RECIPE, "seed": self.random.seed, "config": dict(self.random.config)}
            return digest([("random", json.dumps(recipe, sort_keys=True).encode())])
        file_part = self.in_file(part)
        if file_part is not None:
            described = [("config.json", json.dumps(file_part.config, sort_keys=True).encode())]
            if file_part.unused and not uses_all:
                described.append(("unused", json.dumps(sorted(file_part.unused)).encode()))
            return digest(described, [(file_part.file, file_part.prefix)])
        folder = self.folder(part)
        if not has_weights(part):
            texts = sorted(path for pattern in TEXT_FILES for path in folder.glob(pattern))
            return digest((path.name, path.read_bytes()) for path in texts)
        config_file = folder / CONFIG_FILES[part]
        return digest([(config_file.name, config_file.read_bytes())], [(file, "") for file in weight_files(folder)])

    @property
    def contract(self) -> dict[str, Any]:
        """The conditioning contract of a model that sd3tune wrote (see `contract`); empty for any other model."""
        file = self.path / CONTRACT_FILE
        if self.kind == "file" or not file.is_file():
            return {}
        contract = read_json(file)
        check_contract(str(file), contract, ModelError)
        return contract

    @property
    def noise_offset(self) -> float:
        """The noise offset for sampling with the base alone; see `sampler.add_offset`."""
        return 0.0 if self.random else starting_offset(self.contract)

    def check_encoders(self, encoders: Iterable[str]) -> None:
        """Check the configured encoder and tokenizer files against the base, without reading tensors.

        Raises ModelError with every problem. The own encoders of a folder or Hub base are checked when they are loaded.
        """
        if self.kind != "file" and not self.encoder_files and not self.tokenizers:
            return
        problems: list[str] = []
        file_parts: dict[str, FilePart] = {}
        for encoder in encoders:
            part = ENCODER_PARTS[encoder][1]
            try:
                file_parts[encoder] = self.in_file(part) or FilePart(self.path / part, "", self.config(part))
            except ModelError as error:
                problems += error.problems
        problems += misfits(file_parts, self.config("transformer"))
        try:
            for encoder in encoders:
                self.folder(ENCODER_PARTS[encoder][0])
        except ModelError as error:
            problems += error.problems
        if problems:
            raise ModelError(*problems)

    def _tokenizer(self, part: str) -> Path:
        source = self.tokenizers or VARIANTS.get(str(self.variant))
        expected = "model.tokenizers: a folder that holds tokenizer, tokenizer_2 and tokenizer_3, or such a Hub id"
        if source is None:
            raise ModelError(
                f"{self.name}: a single file holds no tokenizers, and its shape is unknown; give {expected}"
            )
        try:
            if offline_kind(source) is not None:
                root = offline_folder(source)
            elif Path(source).expanduser().is_dir():
                root = Path(source).expanduser()
            else:
                root = download(source, None, hub_patterns(part, weights=False))
        except ModelError as error:
            raise ModelError(f"tokenizers: {error.problems[0]}; or give {expected}") from None
        if not (root / part / CONFIG_FILES[part]).is_file():
            raise ModelError(f"tokenizers: {source}: no {part}/{CONFIG_FILES[part]}; give {expected}")
        return root / part


def _are_weights_there(folder: Path) -> bool:
    try:
        return bool(weight_files(folder))
    except (ModelError, OSError):
        return False


def hub_patterns(part: str, weights: bool) -> list[str]:
    if not has_weights(part):
        return [f"{part}/{pattern}" for pattern in TEXT_FILES]
    config = [f"{part}/{CONFIG_FILES[part]}"]
    stem = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
    plain = (".safetensors", "-*-of-*.safetensors", ".safetensors.index.json")  # no variants such as fp16
    return config + [f"{part}/{stem}{ending}" for ending in plain] if weights else config
