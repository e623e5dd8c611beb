"""The YAML header of a card, with the metadata for the Hub.

Keys: https://huggingface.co/docs/hub/model-cards#model-card-metadata and, for `widget`,
https://huggingface.co/docs/hub/model-cards-components; `instance_prompt` is a key of diffusers.
"""

from __future__ import annotations

from typing import Any

from sd3tune.config.dump import dump_values
from sd3tune.publish.card.licences import licence_of
from sd3tune.publish.card.trained import Trained


def header(trained: Trained) -> str:
    """Return the header as YAML, quoted so that YAML 1.1 and 1.2 agree."""
    return f"---\n{dump_values(metadata(trained))}---"


def metadata(trained: Trained) -> dict[str, Any]:
    """Return the metadata for the Hub, including base and licence if they are known."""
    licence, prompt = licence_of(trained.contract), trained.contract["instance_prompt"]
    return {
        **_base(trained),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": _tags(trained),
        **(licence.header if licence else {}),
        **({"instance_prompt": prompt} if prompt else {}),
        **({"widget": _widget(trained)} if trained.samples else {}),
    }


def _base(trained: Trained) -> dict[str, str]:
    """Return the base's metadata; empty for a local file, whose weights are unproven, and for training from scratch."""
    if trained.contract["base_kind"] != "hub" or trained.from_scratch:
        return {}
    relation = "adapter" if trained.is_for_a_base else "finetune"
    return {"base_model": trained.contract["base"], "base_model_relation": relation}


def _tags(trained: Trained) -> list[str]:
    method = trained.contract["method"]
    return ["text-to-image", "diffusers", "sd3tune", method, *(["template:sd-lora"] if trained.is_adapter else [])]


def _widget(trained: Trained) -> list[dict[str, Any]]:
    return [{"text": sample.drawing.prompt, "output": {"url": sample.file}} for sample in trained.samples]
