"""A picture once more, from the recipe inside it: what no flag says otherwise is as it was."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator
from safetensors import SafetensorError

from sd3tune import __version__
from sd3tune.adapter.file import ADAPTER_FILE, Adapter, find_adapter
from sd3tune.config.run_folder import RUN_FILE
from sd3tune.errors import AdapterError, ConfigError, ModelError
from sd3tune.files.regular import sha256_of
from sd3tune.files.tensors import tensors_sha256
from sd3tune.inference.recipes import read_recipe
from sd3tune.inference.request import Request, parse_lora
from sd3tune.model.base.contract import Part, check_part
from sd3tune.model.base.offline import offline_kind
from sd3tune.model.base.resolve import Base
from sd3tune.terminal import say

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_HUB_COMMIT = re.compile(_HUB_ID.pattern + r":[\w.-]+", re.ASCII)
_LONGEST_NAME = 255
"""Bytes of a file's name."""
_OWN_TEXTS = ("prompt_clip_l", "prompt_clip_g", "prompt_t5")


def _no_longer_than_a_file_name(name: str) -> str:
    if len(name.encode(errors="surrogatepass")) > _LONGEST_NAME:
        raise ValueError(f"Names have at most {_LONGEST_NAME} bytes")
    return name


_Name = Annotated[str, AfterValidator(_no_longer_than_a_file_name)]


class _Lora(Part):
    name: _Name
    sha256: str
    weight: float
    tensors_sha256: str | None = None
    """Known since another header made another file of equal tensors; None in earlier pictures."""

    def is_in(self, path: Path) -> bool:
        """Whether a file holds this adapter."""
        if self.tensors_sha256 is None:
            return _has_content(path, self.sha256)
        try:
            return tensors_sha256(path) == self.tensors_sha256
        except (OSError, SafetensorError):
            return False


class _Image(Part):
    name: _Name
    sha256: str


class _Skip(Part):
    scale: float
    layers: list[int]
    start: float
    stop: float


class _Recipe(Part):
    prompt: str
    negative: str
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]
    sampler: str
    shift: float | None
    base: _Name
    base_revision: str | None
    base_fingerprint: str
    max_sequence_length: int
    encoders: list[Literal["clip_l", "clip_g", "t5"]]
    dtype: Literal["fp32", "bf16", "fp16"]
    loras: list[_Lora]
    prompt_clip_l: str | None = None
    prompt_clip_g: str | None = None
    prompt_t5: str | None = None
    noise_offset: float = 0.0
    slg: _Skip | None = None
    image: _Image | None = None
    strength: float | None = None
    quantize: str | None = None
    t5_8bit: bool = False
    vae_tiling: bool = False
    clip_l_pooled: Literal["unprojected"] | None = None


@dataclass(frozen=True)
class Repeat:
    """A recipe, and the picture it was read from."""

    picture: Path
    recipe: _Recipe

    def check_base(self, base: Base, chosen: bool) -> None:
        """Compare the base with the one of the picture: another one is a warning where it was `chosen`, else an error.

        Raises ModelError.
        """
        if base.ignores_projection and self.recipe.clip_l_pooled is None:
            say(
                f"warning: {self.picture} was drawn with CLIP-L's text_projection, by an earlier sd3tune; Stable "
                "Diffusion 3 does not use it, and neither does this picture"
            )
        if base.fingerprint("transformer") == self.recipe.base_fingerprint:
            return
        said = f"{self.picture} was drawn with {self.recipe.base}, whose weights differ from this {base.label}"
        if not chosen:
            raise ModelError(f"{said}; give the right one, or another, with --base")
        say(f"warning: {said}")

    def check_adapters(self, adapters: Sequence[Adapter]) -> None:
        """Raise AdapterError where an adapter that the recipe names, as one of the Hub, has another content by now."""
        for lora, adapter in zip(self.recipe.loras, adapters, strict=True):
            if not lora.is_in(adapter.path):
                raise AdapterError(
                    f"--from {self.picture}: the adapter {lora.name} is another file than the picture was drawn with "
                    f"(sha256 {lora.sha256[:12]}...); to draw with it nevertheless, give it with --lora"
                )


def read_repeat(picture: Path) -> Repeat:
    """The recipe in a picture that `infer` drew. Raises ConfigError."""
    if not picture.is_file():
        raise ConfigError(f"--from {picture}: no such file")
    found = read_recipe(picture)
    if found is None or "base" not in found:
        raise ConfigError(f"--from {picture}: holds no recipe; only pictures drawn by sd3tune infer can be repeated")
    if "sheet" in found:
        raise ConfigError(f"--from {picture}: shows several pictures; name one of those beside it")
    check_part(f"--from {picture}", _as_python(found), _Recipe, ConfigError)
    if found.get("sd3tune") != __version__:
        say(f"note: {picture} was drawn by sd3tune {found.get('sd3tune')}; this is {__version__}")
    if "batch" in found:
        say(f"note: {picture} was drawn in a batch of {found['batch']}; alone, its last bits may differ")
    return Repeat(picture, _Recipe.model_validate(_as_python(found)))


def repeated(request: Request, repeat: Repeat) -> Request:
    """The request, with what the recipe says wherever it says nothing itself. Raises UserError."""
    recipe = repeat.recipe
    of_the_recipe: dict[str, Any] = {
        "prompt": recipe.prompt if request.prompts is None else None,
        "negative": recipe.negative,
        "seed": recipe.seed,
        "steps": recipe.steps,
        "guidance": recipe.guidance,
        "size": recipe.size,
        "sampler": recipe.sampler,
        "shift": recipe.shift,
        "noise_offset": recipe.noise_offset,
        "t5_tokens": recipe.max_sequence_length,
        "t5": "t5" in recipe.encoders,
        **{name: getattr(recipe, name) for name in _OWN_TEXTS if request.prompt is None},
    }
    if recipe.slg is not None:
        skip = recipe.slg
        layers = tuple(skip.layers)
        of_the_recipe |= {"slg": skip.scale, "slg_layers": layers, "slg_start": skip.start, "slg_stop": skip.stop}
    if recipe.image is not None:
        of_the_recipe |= {
            "image": request.image or _found_image(request, repeat, recipe.image),
            "strength": recipe.strength,
        }
    missing = {name: value for name, value in of_the_recipe.items() if getattr(request, name) is None}
    loras = _chosen_adapters(request, repeat) if request.loras else _found_adapters(request, repeat)
    if request.base is None and request.config is None:
        missing |= _base_of(request, repeat, bool(loras))
    if request.dtype == "auto":
        missing["dtype"] = recipe.dtype
    asked = request.memory
    memory = replace(
        asked,
        quantize=asked.quantize or recipe.quantize or "none",
        t5_8bit=recipe.t5_8bit if asked.t5_8bit is None else asked.t5_8bit,
        vae_tiling=asked.vae_tiling or recipe.vae_tiling,
    )
    # The picture was drawn with these files, so its author has already chosen to leave out their text encoder tensors.
    chosen = request.transformer_only or not request.loras
    return replace(request, loras=loras, memory=memory, before=False, transformer_only=chosen, **missing)


def _base_of(request: Request, repeat: Repeat, has_adapter: bool) -> dict[str, str | None]:
    """Only the last part of a local base's path is in a recipe: an adapter may say where it is."""
    name = repeat.recipe.base
    if offline_kind(name) is not None or _HUB_ID.fullmatch(name):
        return {"base": name, "revision": repeat.recipe.base_revision}
    here = (folder / name for folder in (Path(), *request.look_in) if _is_plain(name) and (folder / name).exists())
    found = next(here, None)
    if found is not None:
        return {"base": str(found), "revision": None}
    if not has_adapter:
        raise ModelError(f"--from {repeat.picture}: drawn with a local base named {name!r}; give it with --base")
    return {}


def _chosen_adapters(request: Request, repeat: Repeat) -> list[str]:
    """Those of `--lora`; of one that the picture was drawn with, the weight is the picture's unless it is given."""
    chosen = []
    for value in request.loras:
        path, _ = parse_lora(value)
        file = find_adapter(path) if path.exists() else None
        used = next((lora for lora in repeat.recipe.loras if file and lora.is_in(file)), None)
        if used is None and str(path) not in [lora.name for lora in repeat.recipe.loras]:
            say(f"warning: {repeat.picture} was drawn without {value}, or with another file of that name")
        chosen.append(f"{path}@{used.weight}" if used and str(path) == value else value)
    return chosen


def _found_adapters(request: Request, repeat: Repeat) -> list[str]:
    """By their content, in the places where pictures and adapters lie; those of the Hub by name and commit."""
    found, problems = [], []
    for lora in repeat.recipe.loras:
        near = (path for path in _candidates(request, repeat.picture, lora.name) if lora.is_in(path))
        path = lora.name if _HUB_COMMIT.fullmatch(lora.name) else next(near, None)
        if path is None:
            problems.append(
                f"--from {repeat.picture}: drawn with the adapter {lora.name!r} (sha256 {lora.sha256[:12]}...), "
                "which is not found near it or in runs/; name its folder with --look-in, or give it with --lora"
            )
        found.append(f"{path}@{lora.weight}")
    if problems:
        raise AdapterError(*problems)
    return found


def _found_image(request: Request, repeat: Repeat, image: _Image) -> Path:
    """Near the picture, in the working directory or in a folder of `--look-in`, by its content."""
    for folder in (*_near(repeat.picture), Path.cwd(), *request.look_in):
        path = folder / image.name
        if _is_plain(image.name) and _has_content(path, image.sha256):
            return path
    raise ConfigError(
        f"--from {repeat.picture}: drawn from the picture {image.name!r} (sha256 {image.sha256[:12]}...), which is not "
        "found near it; name its folder with --look-in, or give it with --image"
    )


def _near(picture: Path) -> list[Path]:
    """The picture's folder and the three above it."""
    return list(picture.absolute().parents[:4])


def _candidates(request: Request, picture: Path, name: str) -> Iterator[Path]:
    """Files that may be the adapter called `name`, the nearest first. A name is neither a path nor a pattern."""
    deeper = (file.parent for file in sorted(Path("runs").glob(f"*/*/{RUN_FILE}")))  # as those of the demo
    roots = [*_near(picture), Path.cwd(), *request.look_in, *sorted(Path("runs").glob("*")), *deeper]
    names = [ADAPTER_FILE, *([f"{name}.safetensors"] if _is_plain(name) else [])]
    for root in roots:
        checkpoints = sorted((root / "checkpoints").glob("*"))
        for folder in (root, root / "adapter", root / "adapter_raw", root / "best" / "adapter", *checkpoints):
            yield from (folder / file for file in names)


def _is_plain(name: str) -> bool:
    """Whether a recipe's name is that of a file in a folder, and leads nowhere else."""
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0")


def _has_content(path: Path, sha256: str) -> bool:
    try:
        return sha256_of(path) == sha256
    except OSError:
        return False


def _as_python(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    size = recipe.get("size")
    return {**recipe, "size": tuple(size) if isinstance(size, list) else size}
