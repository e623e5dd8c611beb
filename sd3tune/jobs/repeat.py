"""A picture once more, from the recipe inside it: what no flag says otherwise is as it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sd3tune import __version__
from sd3tune.config.run_folder import RUN_FILE
from sd3tune.errors import AdapterError, ConfigError, ModelError
from sd3tune.jobs.recipes import file_sha256, read_recipe
from sd3tune.jobs.request import Request, parse_lora
from sd3tune.model.adapter_io import ADAPTER_FILE, find_adapter
from sd3tune.model.bases import Base
from sd3tune.model.contract import Part, check_part
from sd3tune.model.offline import offline_kind
from sd3tune.terminal import say

_OWN_TEXTS = ("prompt_clip_l", "prompt_clip_g", "prompt_t5")


class _Lora(Part):
    name: str
    sha256: str
    weight: float


class _Image(Part):
    name: str
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
    base: str
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
        of_the_recipe |= {"image": request.image or _found_image(repeat, recipe.image), "strength": recipe.strength}
    missing = {name: value for name, value in of_the_recipe.items() if getattr(request, name) is None}
    loras = _chosen_adapters(request, repeat) if request.loras else _found_adapters(repeat)
    if request.base is None and request.config is None:
        missing |= _base_of(repeat, bool(loras))
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


def _base_of(repeat: Repeat, has_adapter: bool) -> dict[str, str | None]:
    """Only the last part of a local base's path is in a recipe: an adapter may say where it is."""
    name = repeat.recipe.base
    if offline_kind(name) is not None or "/" in name or Path(name).exists():
        return {"base": name, "revision": repeat.recipe.base_revision}
    if not has_adapter:
        raise ModelError(f"--from {repeat.picture}: drawn with a local base named {name!r}; give it with --base")
    return {}


def _chosen_adapters(request: Request, repeat: Repeat) -> list[str]:
    """Those of `--lora`; of one that the picture was drawn with, the weight is the picture's unless it is given."""
    weights = {lora.sha256: lora.weight for lora in repeat.recipe.loras}
    chosen = []
    for value in request.loras:
        path, _ = parse_lora(value)
        digest = file_sha256(find_adapter(path)) if path.exists() else None
        known = digest in weights or str(path) in [lora.name for lora in repeat.recipe.loras]
        if not known:
            say(f"warning: {repeat.picture} was drawn without {value}, or with another file of that name")
        chosen.append(f"{path}@{weights[digest]}" if digest in weights and str(path) == value else value)
    return chosen


def _found_adapters(repeat: Repeat) -> list[str]:
    """Near the picture and below the working directory, by their content; those of the Hub by name and commit."""
    found, problems = [], []
    for lora in repeat.recipe.loras:
        near = (path for path in _candidates(repeat.picture, lora.name) if file_sha256(path) == lora.sha256)
        path = lora.name if ":" in lora.name else next(near, None)
        if path is None:
            problems.append(
                f"--from {repeat.picture}: drawn with the adapter {lora.name!r} (sha256 {lora.sha256[:12]}...), "
                "which is not found near it or in runs/; give it with --lora"
            )
        found.append(f"{path}@{lora.weight}")
    if problems:
        raise AdapterError(*problems)
    return found


def _found_image(repeat: Repeat, image: _Image) -> Path:
    """Near the picture or in the working directory, by its content."""
    for folder in (*repeat.picture.absolute().parents[:3], Path.cwd()):
        path = folder / image.name
        if path.is_file() and file_sha256(path) == image.sha256:
            return path
    raise ConfigError(
        f"--from {repeat.picture}: drawn from the picture {image.name!r} (sha256 {image.sha256[:12]}...), which is not "
        "found near it; give it with --image"
    )


def _candidates(picture: Path, name: str) -> Iterator[Path]:
    """Files that may be the adapter called `name`, the nearest first."""
    deeper = (file.parent for file in sorted(Path("runs").glob(f"*/*/{RUN_FILE}")))  # as those of the demo
    roots = [*picture.absolute().parents[:3], Path.cwd(), *sorted(Path("runs").glob("*")), *deeper]
    for root in roots:
        for folder in (".", "adapter", "adapter_raw", "best/adapter", "checkpoints/*"):
            for file in (ADAPTER_FILE, f"{name}.safetensors"):
                yield from sorted(root.glob(f"{folder}/{file}"))


def _as_python(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples."""
    size = recipe.get("size")
    return {**recipe, "size": tuple(size) if isinstance(size, list) else size}
