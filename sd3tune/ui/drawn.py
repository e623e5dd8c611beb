"""Pictures that were drawn, and what their recipes say: in words, and as the form of *Try*."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3tune.files.png_recipe import read_recipe
from sd3tune.files.regular import sha256_of
from sd3tune.inference import image_request
from sd3tune.inference.job import ALL_PARAMETERS
from sd3tune.model.base.offline import offline_kind
from sd3tune.publish.previews import PREVIEW_NAME, SAMPLES, preview_recipe
from sd3tune.ui.drawing import ON_THE_HUB, SAMPLERS
from sd3tune.ui.products import Source, Weights, run_source, sources
from sd3tune.ui.workspace import Workspace

_RECIPE_KEYS = {"base", "dtype"}
"""Keys of the recipes that `infer` writes, and previews lack."""
_SHEETS = {"grid": "a grid", "before-after": "before and after"}
_BY_CONTENT = ("loras", "embeddings", "base", "image", "mask")
"""Parts that `infer --from` finds by their content or name."""
_LONGEST = 4000
"""Characters of a value that are shown."""
_MOST_BYTES = 4 * 2**30
"""Of adapters that are read to find those of a recipe."""


def pictures(folder: Path) -> list[tuple[Path, int]]:
    """Return the PNGs of a folder with the time of their last change in nanoseconds, newest first."""
    try:
        with os.scandir(folder) as entries:
            found = [
                (folder / entry.name, entry.stat(follow_symlinks=False).st_mtime_ns)
                for entry in entries
                if entry.name.endswith(".png") and entry.name[0] != "." and entry.is_file(follow_symlinks=False)
            ]
    except OSError:
        return []
    return sorted(found, key=lambda one: (-one[1], one[0].name))


def digest(found: list[tuple[Path, int]]) -> str:
    """Return a text that changes with the pictures of a folder."""
    return hashlib.sha256(repr(found).encode(errors="surrogatepass")).hexdigest()[:16]


def described(workspace: Workspace, picture: Path) -> dict[str, Any]:
    """Return what a picture's recipe says: `says`, pairs of words, and `values`, the form that draws it again.

    `values` is None for a sheet and for a picture without recipe; `note` then says why. `repeats` is set for a picture
    that `infer --from` takes, with `--base` if `base` is set.
    """
    recipe = read_recipe(picture)
    if preview_recipe(picture) is not None and isinstance(recipe, dict):
        return _preview(workspace, picture, recipe)
    if not isinstance(recipe, dict) or not recipe.keys() >= _RECIPE_KEYS:
        note = "It holds no recipe of sd3tune: it was drawn elsewhere, or changed since."
        return {"says": [], "values": None, "note": note}
    says = [[name, _text(value, name)[:_LONGEST]] for name, value in _in_words(recipe) if value != ""]
    if "sheet" in recipe:
        kind = _SHEETS.get(str(recipe["sheet"]), "several pictures")
        return {"says": says, "values": None, "note": f"A sheet: {kind}. Its pictures can be drawn again."}
    loras = _adapters(workspace, recipe)
    lost = ", ".join(one["name"] for one in loras if one["place"] is None)
    note = f"Not found here: {lost}. The command looks near the picture and in runs/." if lost else ""
    base = _local_base(workspace, recipe) if not loras else None
    return {"says": says, "values": _values(recipe), "loras": loras, "base": base, "note": note, "repeats": True}


def _preview(workspace: Workspace, picture: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the form for a preview of a training, whose recipe leaves the model to its run."""
    says = [[name, _text(value, name)] for name, value in recipe.items() if name not in ("slg", "weights")]
    run = picture.parent.parent if picture.parent.name == SAMPLES else None
    source = run_source(run) if run is not None and workspace.holds(run) else None
    if source is None or not source.weights:
        note = "A preview of a training whose weights are not here."
        return {"says": says, "values": None, "note": note}
    found = PREVIEW_NAME.fullmatch(picture.name)
    step = int(found[1]) if found else None
    weights, note = _weights_at(source, step)
    values: dict[str, Any] = {
        name: _text(value, name) for name, value in recipe.items() if name in image_request.PARAMETERS and name != "slg"
    }
    if isinstance(slg := recipe.get("slg"), dict):
        values |= {"slg": _text(slg["scale"])}
        values |= {f"slg_{key}": _text(slg[key]) for key in ("layers", "start", "stop")}
    place, weight = workspace.shown(weights.path), 0.0 if step in (None, 0) else 1.0
    where = {"adapter": "loras", "embedding": "embeddings", "model": "base"}[weights.kind]
    if weights.kind != "adapter":
        values[where] = place if where == "base" else [place]
    loras = [{"place": place, "name": source.name, "weight": weight}] if weights.kind == "adapter" else []
    return {"says": [["step", _text(step or 0)], *says], "values": values, "loras": loras, "note": note}


def _weights_at(source: Source, step: int | None) -> tuple[Weights, str]:
    """Return the weights of a preview's step, or the final ones with a note."""
    last = source.weights[0]
    if step in (None, 0):
        return last, "" if last.kind == "adapter" else "It shows the base, before the training."
    kept = next((one for one in source.weights if one.step == step), None)
    return kept or last, "" if kept else f"Step {step} was not kept; this draws with the weights of {last.label}."


def _values(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe's values of the form's fields."""
    values: dict[str, Any] = {}
    for name, parameter in ALL_PARAMETERS.items():
        if parameter.recipe is None or parameter.help is None or name in _BY_CONTENT:
            continue
        value: Any = recipe
        for key in parameter.recipe.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if name == "t5":
            value = isinstance(value, list) and "t5" in value
        if isinstance(value, bool):
            values[name] = value
        elif value is not None and not isinstance(value, dict):
            values[name] = _text(value, name)
    if values.get("sampler") not in SAMPLERS:
        values.pop("sampler", None)
    return values


def _adapters(workspace: Workspace, recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the recipe's adapters: name, weight, and place, which is None for one that is not found here."""
    used = _objects(recipe, "loras")
    found = _by_content(workspace, {str(one.get("sha256")): str(one.get("name")) for one in used})
    loras = []
    for one in used:
        name = str(one.get("name"))
        place = name if ON_THE_HUB.fullmatch(name) else found.get(str(one.get("sha256")))
        loras.append({"name": name, "weight": one.get("weight"), "place": place})
    return loras


def _by_content(workspace: Workspace, wanted: Mapping[str, str]) -> dict[str, str]:
    """Return the places of adapters by digest; `wanted` maps digests to names, and files of such a name come first."""
    here = [one for source in sources(workspace) for one in source.weights if one.kind == "adapter"] if wanted else []
    names, found, read = {*wanted.values()}, dict[str, str](), 0
    for weights in sorted(here, key=lambda one: not names & {*one.file.parts, one.file.stem}):
        if read > _MOST_BYTES or found.keys() >= wanted.keys():
            break
        about = weights.file.stat()
        read += about.st_size
        found.setdefault(_sha256(weights.file, about.st_mtime_ns, about.st_size), workspace.shown(weights.path))
    return found


def _local_base(workspace: Workspace, recipe: Mapping[str, Any]) -> str | None:
    """Return the only whole model here with the name of the recipe's base, which `--from` does not look for."""
    name = str(recipe.get("base"))
    if offline_kind(name) is not None or ON_THE_HUB.fullmatch(name):
        return None
    here = [one for source in sources(workspace) for one in source.weights if one.kind == "model"]
    named = [workspace.shown(one.path) for one in here if one.path.name == name]
    return named[0] if len(named) == 1 else None


@functools.lru_cache(1024)
def _sha256(file: Path, changed: int, size: int) -> str:
    return sha256_of(file)


def _in_words(recipe: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield name and value of the recipe's entries, without digests and the model's lists."""
    for parameter in image_request.PARAMETERS.values():
        if parameter.recipe in recipe:
            yield parameter.name.replace("_", " "), recipe[str(parameter.recipe)]
    if isinstance(recipe.get("slg"), dict):
        yield "skip-layer guidance", recipe["slg"].get("scale")
    for lora in _objects(recipe, "loras"):
        yield "adapter", f"{lora.get('name')} at {_text(lora.get('weight'))}"
    for one in _objects(recipe, "embeddings"):
        yield "embedding", one.get("name")
    yield "base", recipe.get("base")
    if isinstance(recipe.get("encoders"), list):
        yield "text encoders", ", ".join(map(str, recipe["encoders"]))
    for name in ("dtype", "quantize", "sd3tune"):
        if recipe.get(name) is not None:
            yield name, recipe[name]


def _objects(recipe: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return a list of objects in a recipe, which may come from a stranger."""
    value = recipe.get(key)
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _text(value: Any, name: str = "") -> str:
    """Return the value of a field as the form shows it; reading it gives the value again."""
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, list):
        return ("x" if name == "size" else ",").join(map(str, value))
    return str(value.get("name", "")) if isinstance(value, dict) else str(value)
