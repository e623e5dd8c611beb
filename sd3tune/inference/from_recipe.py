"""Draw a picture again from the recipe inside it; given fields override the recipe's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, create_model
from safetensors import SafetensorError

from sd3tune import __version__
from sd3tune.adapter.embedding import EMBEDDING_FILE, Embedding
from sd3tune.adapter.file import ADAPTER_FILE, Adapter, find_adapter
from sd3tune.config.run_folder import RUN_FILE
from sd3tune.errors import AdapterError, ConfigError, ModelError
from sd3tune.files.regular import MAX_NAME_BYTES, sha256_of
from sd3tune.files.tensors import tensors_sha256
from sd3tune.inference.image_request import PARAMETERS, PROMPT_OF
from sd3tune.inference.job import MEMORY_PARAMETERS, InferenceJob, Memory
from sd3tune.inference.lora_argument import parse_lora
from sd3tune.inference.parameters import Parameter
from sd3tune.inference.recipes import read_recipe
from sd3tune.model.base.base import Base
from sd3tune.model.base.contract import Part, check_part
from sd3tune.model.base.offline import name_of_version, offline_kind
from sd3tune.reporting import say

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_PRODUCTS = ("embedding", "embedding_raw", "adapter", "adapter_raw")
_HUB_COMMIT = re.compile(_HUB_ID.pattern + r":[\w.-]+", re.ASCII)


def _no_longer_than_a_file_name(name: str) -> str:
    if len(name.encode(errors="surrogatepass")) > MAX_NAME_BYTES:
        raise ValueError(f"Names have at most {MAX_NAME_BYTES} bytes")
    return name


_Name = Annotated[str, AfterValidator(_no_longer_than_a_file_name)]


class _Lora(Part):
    name: _Name
    sha256: str
    weight: float
    tensors_sha256: str | None = None
    """Digest of the tensors alone, equal when only the file's header changes; None in earlier pictures."""
    embedding: str | None = None
    """Digest of the file with its learned token, which lies beside it; None without one."""

    def is_in(self, path: Path) -> bool:
        """Return True if the file holds this adapter, and its learned token lies beside it."""
        if self.embedding is not None and not _has_content(path.with_name(EMBEDDING_FILE), self.embedding):
            return False
        if self.tensors_sha256 is None:
            return _has_content(path, self.sha256)
        try:
            return tensors_sha256(path) == self.tensors_sha256
        except (OSError, SafetensorError):
            return False


class _File(Part):
    name: _Name
    sha256: str


class _ModelPart(Part):
    """The entries about base, adapters and precision; `Recipe` adds one for each parameter that has a recipe key."""

    base: _Name
    base_revision: str | None
    base_fingerprint: str
    max_sequence_length: int
    encoders: list[Literal["clip_l", "clip_g", "t5"]]
    dtype: Literal["fp32", "bf16", "fp16"]
    loras: list[_Lora]
    clip_l_pooled: Literal["unprojected"] | None = None
    embeddings: list[_File] = Field(default=[])
    lora_encoders: list[Literal["clip_l", "clip_g", "t5"]] = Field(default=[])
    """The text encoders that the adapters change; empty in earlier pictures, whose adapters were without such parts."""


def _entries() -> dict[str, Any]:
    """Return the entries of the parameters by key, as (type, default) for `create_model`."""
    entries: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    for parameter in (*PARAMETERS.values(), *MEMORY_PARAMETERS.values()):
        if parameter.recipe is None:
            continue
        group, _, key = parameter.recipe.rpartition(".")
        kind = _json_type(parameter)
        if group:
            groups.setdefault(group, {})[key] = (kind, ...)
        elif parameter.requires is not None:
            entries[key] = (kind | None, None)
        else:
            nullable = parameter.can_be_none and parameter.name != "size"  # a written recipe always has the size
            entries[key] = (kind | None if nullable else kind, parameter.default if parameter.optional else ...)
    models = {group: create_model(group, __base__=Part, **inside) for group, inside in groups.items()}
    return entries | {group: (model | None, None) for group, model in models.items()}


def _json_type(parameter: Parameter) -> Any:
    if parameter.type is Path:
        return _File
    if parameter.type == tuple[int, int]:
        return Annotated[list[int], Field(min_length=2, max_length=2)]
    if parameter.type == tuple[int, ...]:
        return list[int]
    return parameter.type


Recipe: type[_ModelPart] = create_model("Recipe", __base__=_ModelPart, **_entries())


@dataclass(frozen=True)
class SourcePicture:
    """A picture that is drawn again, and its recipe."""

    picture: Path
    recipe: _ModelPart

    def check_base(self, base: Base, chosen: bool) -> None:
        """Compare the base with the picture's: another one is a warning if the user has `chosen` it, else an error.

        Raises ModelError.
        """
        if base.ignores_projection and self.recipe.clip_l_pooled is None:
            say(
                f"warning: {self.picture} was drawn with CLIP-L's text_projection, by an earlier sd3tune; Stable "
                "Diffusion 3 does not use it, and neither does this picture"
            )
        if base.fingerprint("transformer") == self.recipe.base_fingerprint:
            return
        drawn_with = name_of_version(self.recipe.base, self.recipe.base_fingerprint)
        difference = f"{self.picture} was drawn with {drawn_with}, whose weights differ from this {base.label}"
        if not chosen:
            raise ModelError(f"{difference}; give the right one, or another, with --base")
        say(f"warning: {difference}")

    def check_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Raise AdapterError for an adapter on the Hub whose content has changed since the picture was drawn."""
        for lora, adapter in zip(self.recipe.loras, adapters, strict=True):
            if not lora.is_in(adapter.path):
                raise AdapterError(
                    f"--from {self.picture}: the adapter {lora.name} is another file than the picture was drawn with "
                    f"(sha256 {lora.sha256[:12]}...); to draw with it nevertheless, give it with --lora"
                )

    def check_embeddings(self, embeddings: Sequence[Embedding]) -> None:
        """Do as `check_adapters` for an embedding on the Hub."""
        for known, embedding in zip(self.recipe.embeddings, embeddings, strict=True):
            if not _has_content(embedding.path, known.sha256):
                raise AdapterError(
                    f"--from {self.picture}: the embedding {known.name} is another file than the picture was drawn "
                    f"with (sha256 {known.sha256[:12]}...); to draw with it nevertheless, give it with --embedding"
                )


def read_source(picture: Path) -> SourcePicture:
    """Return a picture that `infer` drew, with its recipe. Raises ConfigError for any other file."""
    if not picture.is_file():
        raise ConfigError(f"--from {picture}: no such file")
    recipe = read_recipe(picture)
    if recipe is None or "base" not in recipe:
        raise ConfigError(f"--from {picture}: holds no recipe; only pictures drawn by sd3tune infer can be repeated")
    if "sheet" in recipe:
        raise ConfigError(f"--from {picture}: shows several pictures; name one of those beside it")
    check_part(f"--from {picture}", recipe, Recipe, ConfigError)
    if recipe.get("sd3tune") != __version__:
        say(f"note: {picture} was drawn by sd3tune {recipe.get('sd3tune')}; this is {__version__}")
    if "batch" in recipe:
        say(f"note: {picture} was drawn in a batch of {recipe['batch']}; alone, its last bits may differ")
    return SourcePicture(picture, Recipe.model_validate(recipe))


def fill_from_recipe(job: InferenceJob, source: SourcePicture) -> InferenceJob:
    """Return the job, with every field that was not given filled in from the recipe. Raises UserError."""
    recipe = source.recipe
    given = {**_image_fields(job, source), **job.given}
    loras = _chosen_adapters(job, source) if job.loras else _found_adapters(job, source)
    missing: dict[str, Any] = {}
    if job.base is None and job.config is None:
        missing |= _base_fields(job, source, bool(loras))
    if job.t5_tokens is None:
        missing["t5_tokens"] = recipe.max_sequence_length
    if job.t5 is None:
        missing["t5"] = "t5" in recipe.encoders
    if job.dtype == "auto":
        missing["dtype"] = recipe.dtype
    missing["embeddings"] = job.embeddings or [str(_found_embedding(job, source, one)) for one in recipe.embeddings]
    # Found adapters are those of the picture: their tensors for text encoders were applied, or its author ignored them.
    missing["transformer_only"] = job.transformer_only or not (job.loras or recipe.lora_encoders)
    return replace(job, given=given, loras=loras, memory=_memory(job.memory, recipe), before=False, **missing)


def _image_fields(job: InferenceJob, source: SourcePicture) -> dict[str, Any]:
    """Return the recipe's fields of `ImageRequest`, without the texts that the job replaces."""
    image_fields: dict[str, Any] = {}
    for name, parameter in PARAMETERS.items():
        needed = PARAMETERS[parameter.requires] if parameter.requires else parameter
        if name in job.given or _entry(source.recipe, needed) is None:
            continue
        value = _entry(source.recipe, parameter)
        if isinstance(value, _File):
            value = _found_image(job, source, value, parameter.flag)
        if value is not None:
            image_fields[name] = tuple(value) if isinstance(value, list) else value
    replaced = {"prompt"} if job.prompts is not None else set()
    if "prompt" in job.given:
        replaced |= set(PROMPT_OF.values())
    return {name: value for name, value in image_fields.items() if name not in replaced}


def _entry(recipe: _ModelPart, parameter: Parameter) -> Any:
    """Return the value of a parameter in the recipe; None if the recipe has none."""
    if parameter.recipe is None:
        return None
    value: Any = recipe
    for key in parameter.recipe.split("."):
        value = getattr(value, key, None)
    return value


def _memory(memory: Memory, recipe: _ModelPart) -> Memory:
    """Return the given memory options, else the recipe's. A recipe leaves out options that are off."""
    changes: dict[str, Any] = {
        name: getattr(recipe, parameter.recipe) or ("none" if parameter.type is str else False)
        for name, parameter in MEMORY_PARAMETERS.items()
        if parameter.recipe is not None and getattr(memory, name) in (None, parameter.default)
    }
    return replace(memory, **changes)


def _base_fields(job: InferenceJob, source: SourcePicture, has_adapter: bool) -> dict[str, str | None]:
    """Return the fields that name the base. A recipe holds only the last component of a local path."""
    name = name_of_version(source.recipe.base, source.recipe.base_fingerprint)
    if offline_kind(name) is not None or _HUB_ID.fullmatch(name):
        return {"base": name, "revision": source.recipe.base_revision}
    local = (folder / name for folder in (Path(), *job.look_in) if _is_plain(name) and (folder / name).exists())
    path = next(local, None)
    if path is not None:
        return {"base": str(path), "revision": None}
    if not has_adapter:
        raise ModelError(f"--from {source.picture}: drawn with a local base named {name!r}; give it with --base")
    return {}


def _chosen_adapters(job: InferenceJob, source: SourcePicture) -> list[str]:
    """Return the adapters of `--lora`. One from the recipe keeps its weight there, unless `@weight` is given."""
    chosen = []
    for value in job.loras:
        path, _ = parse_lora(value)
        file = find_adapter(path) if path.exists() else None
        used = next((lora for lora in source.recipe.loras if file and lora.is_in(file)), None)
        if used is None and str(path) not in [lora.name for lora in source.recipe.loras]:
            say(f"warning: {source.picture} was drawn without {value}, or with another file of that name")
        chosen.append(f"{path}@{used.weight}" if used and str(path) == value else value)
    return chosen


def _found_adapters(job: InferenceJob, source: SourcePicture) -> list[str]:
    """Find the recipe's adapters: by content near the picture and in `runs/`, on the Hub by name and commit."""
    chosen, problems = [], []
    for lora in source.recipe.loras:
        near = (path for path in _candidates(job, source.picture, lora.name) if lora.is_in(path))
        path = lora.name if _HUB_COMMIT.fullmatch(lora.name) else next(near, None)
        if path is None:
            problems.append(
                f"--from {source.picture}: drawn with the adapter {lora.name!r} (sha256 {lora.sha256[:12]}...), "
                "which is not found near it or in runs/; name its folder with --look-in, or give it with --lora"
            )
        chosen.append(f"{path}@{lora.weight}")
    if problems:
        raise AdapterError(*problems)
    return chosen


def _found_embedding(job: InferenceJob, source: SourcePicture, embedding: _File) -> Path:
    """Find a file of learned tokens: on the Hub by name and commit, else by content near the picture, in the working
    directory, `--look-in` or `runs/`.
    """
    if _HUB_COMMIT.fullmatch(embedding.name):
        return Path(embedding.name)
    names = [EMBEDDING_FILE, *([embedding.name] if _is_plain(embedding.name) else [])]
    for root in (*_near(source.picture), Path.cwd(), *job.look_in, *sorted(Path("runs").glob("*"))):
        checkpoints = sorted((root / "checkpoints").glob("*/embedding"))
        for folder in (root, *(root / name for name in _PRODUCTS), *checkpoints):
            for path in (folder / name for name in names):
                if _has_content(path, embedding.sha256):
                    return path
    raise AdapterError(
        f"--from {source.picture}: drawn with the embedding {embedding.name!r} (sha256 {embedding.sha256[:12]}...), "
        "which is not found near it or in runs/; name its folder with --look-in, or give it with --embedding"
    )


def _found_image(job: InferenceJob, source: SourcePicture, image: _File, flag: str) -> Path:
    """Find the start image or mask by content: near the picture, in the working directory or a `--look-in` folder."""
    for folder in (*_near(source.picture), Path.cwd(), *job.look_in):
        path = folder / image.name
        if _is_plain(image.name) and _has_content(path, image.sha256):
            return path
    raise ConfigError(
        f"--from {source.picture}: drawn from the picture {image.name!r} (sha256 {image.sha256[:12]}...), which is not "
        f"found near it; name its folder with --look-in, or give it with {flag}"
    )


def _near(picture: Path) -> list[Path]:
    """Return the picture's folder and the three above it."""
    return list(picture.absolute().parents[:4])


def _candidates(job: InferenceJob, picture: Path, name: str) -> Iterator[Path]:
    """Yield files that may be the adapter `name`, nearest first.

    A name with path separators, which a stranger's recipe may contain, is never used as a path.
    """
    deeper = (file.parent for file in sorted(Path("runs").glob(f"*/*/{RUN_FILE}")))  # the demo nests its runs once more
    roots = [*_near(picture), Path.cwd(), *job.look_in, *sorted(Path("runs").glob("*")), *deeper]
    names = [ADAPTER_FILE, *([f"{name}.safetensors"] if _is_plain(name) else [])]
    for root in roots:
        checkpoints = sorted((root / "checkpoints").glob("*"))
        for folder in (root, root / "adapter", root / "adapter_raw", root / "best" / "adapter", *checkpoints):
            yield from (folder / file for file in names)


def _is_plain(name: str) -> bool:
    """Return True if `name` is a plain file name, without separators; a recipe may come from a stranger."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _has_content(path: Path, sha256: str) -> bool:
    try:
        return sha256_of(path) == sha256
    except OSError:
        return False
