"""Metadata of an adapter that other programs show: ModelSpec's and sd-scripts' keys.

SwarmUI shows `modelspec.*` (https://github.com/Stability-AI/ModelSpec, version 1.0.1) and, without a trigger phrase
there, `trained_words`. A1111 and Forge name an adapter by `ss_output_name` and suggest prompts from `ss_tag_frequency`;
SD.Next sorts by `ss_base_model_version`. It contains no date, so that equal runs write equal files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd3tune.adapter.layouts import forms
from sd3tune.model.base.parts import VARIANTS

THUMBNAIL_KEY = "modelspec.thumbnail"
ARCHITECTURES = {
    "sd3-medium": "stable-diffusion-3-3-medium/lora",
    "sd35-medium": "stable-diffusion-3-3-5-medium/lora",
    "sd35-large": "stable-diffusion-3-3-5-large/lora",
}
"""Key of `VARIANTS` -> the architecture, as sd-scripts names it."""
OF_THE_TENSORS = ("modelspec.architecture", "modelspec.implementation", "ss_base_model_version")
"""Keys that follow from the tensors and their layout; other keys are kept from an earlier file."""


def shown_metadata(
    form: str, name: str | None, contract: Mapping[str, Any], fitting: Sequence[str] = ()
) -> dict[str, str]:
    """Return the metadata of an adapter in `form` (`diffusers`, `kohya` or `comfyui`), without empty values.

    `name` is the file's; the title is the run's name if the contract has it. `fitting` lists the keys of `VARIANTS`
    that the modules' sizes allow. It counts if the contract names no released model, and only with one entry.
    """
    variant, title = _variant(contract, fitting), contract.get("name") or name
    trigger = contract.get("trigger") or contract.get("instance_prompt")
    side, tags = contract.get("resolution"), contract.get("tag_frequency")
    found = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURES[variant] if variant else None,
        "modelspec.implementation": forms()[form].implementation,
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}" if side else None,
        "modelspec.trigger_phrase": trigger,
        "modelspec.usage_hint": _hint(contract),
        "trained_words": trigger,
        "ss_output_name": name,
        "ss_base_model_version": _family(contract, [variant] if variant else fitting),
        "ss_tag_frequency": json.dumps({title or "captions": tags}) if tags else None,
    }
    return {key: value for key, value in found.items() if value}


def tag_frequency(captions: Iterable[str]) -> dict[str, int]:
    """Return tag -> number of captions, the most frequent first; commas separate tags, as in sd-scripts."""
    counts = Counter(tag for caption in captions for part in caption.split(",") if (tag := part.strip()))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe_tags(tags: Mapping[str, int]) -> str:
    """Return a line about the tags that the file publishes."""
    some = ", ".join(map(repr, list(tags)[:5])) + (f" and {len(tags) - 5} more" if len(tags) > 5 else "")
    count = f"{len(tags)} tag{'s' * (len(tags) != 1)}"
    return f"the adapter's metadata holds {count} from the captions, for all to read (data.export_tags): {some}"


def _variant(contract: Mapping[str, Any], fitting: Sequence[str]) -> str | None:
    """Return the released model (a key of `VARIANTS`) that the base is, if that is certain."""
    by_repository = {repository: variant for variant, repository in VARIANTS.items()}
    if "base_released_as" in contract:
        return by_repository.get(contract["base_released_as"])
    known = by_repository.get(str(contract.get("base")))
    return known or (fitting[0] if len(fitting) == 1 else None)


def _family(contract: Mapping[str, Any], fitting: Sequence[str]) -> str | None:
    if not fitting:
        return None
    newer = all(variant.startswith("sd35") for variant in fitting)
    named = re.search(r"3[.\-_]?5", str(contract.get("base"))) is not None
    return "sd3.5" if newer or named else "sd3"


def _hint(contract: Mapping[str, Any]) -> str:
    """Return the settings of the adapter's previews in a few words."""
    hints = []
    if "sampling_steps" in contract:
        steps = contract["sampling_steps"]
        hints.append(f"{steps} step{'s' * (steps != 1)}")
    if "guidance" in contract:
        hints.append(f"guidance {contract['guidance']:g}")
    if "max_sequence_length" in contract:
        uses_t5 = "t5" in contract.get("encoders", ["t5"])
        hints.append(f"{contract['max_sequence_length']} T5 tokens" if uses_t5 else "no T5")
    return ", ".join(hints)
