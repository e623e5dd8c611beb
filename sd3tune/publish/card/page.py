"""The whole card: header and sections."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sd3tune.publish.card.evaluated import evaluated_section
from sd3tune.publish.card.header import header
from sd3tune.publish.card.licences import licence_section
from sd3tune.publish.card.limits import limits_section
from sd3tune.publish.card.markdown import code
from sd3tune.publish.card.measured import measured_section
from sd3tune.publish.card.trained import Trained
from sd3tune.publish.card.training import training_section
from sd3tune.publish.card.usage import usage_section

_MARKED = re.compile(r"---\n# sd3tune card ([0-9a-f]{16})\n(.*)", re.DOTALL)


def card(trained: Trained) -> str:
    """Return the card: a YAML header and Markdown, without local paths, host names or tokens.

    A comment in the header has a digest of the rest, for `is_unchanged`.
    """
    page = "\n\n".join([header(trained), *_sections(trained)]) + "\n"
    rest = page.removeprefix("---\n")
    return f"---\n# sd3tune card {_digest(rest)}\n{rest}"


def is_unchanged(text: str) -> bool:
    """Return whether a card is unedited. Cards of versions without a digest count as edited."""
    found = _MARKED.fullmatch(text)
    return found is not None and found[1] == _digest(found[2])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _sections(trained: Trained) -> Iterator[str]:
    yield f"# {trained.config.name}"
    if trained.config.hub.description:
        yield trained.config.hub.description.strip()
    yield _what(trained)
    yield from _gallery(trained)
    yield _trigger(trained)
    yield usage_section(trained)
    yield training_section(trained)
    yield measured_section(trained)
    if evaluated := evaluated_section(trained):
        yield evaluated
    yield limits_section(trained)
    yield licence_section(trained)


def _what(trained: Trained) -> str:
    step, of = trained.step, trained.config.train.total_steps
    state = "" if step is None else f" It is not finished: this is step {step} of {of}."
    return f"{_product(trained)}, trained with sd3tune.{state}"


def _product(trained: Trained) -> str:
    contract, base = trained.contract, code(trained.contract["base"])
    if contract["base_kind"] == "hub":
        base = f"[{contract['base']}](https://huggingface.co/{contract['base']})"
    if trained.is_adapter:
        token = f", with the embedding of the token {code(trained.learned['token'])}" if trained.learned else ""
        return f"A {trained.kind_of_adapter} adapter for {base}{token}"
    if trained.is_embedding:
        return f"The embedding of the token {code(contract['token'])} for {base}"
    if trained.from_scratch:
        return f"A model of Stable Diffusion 3's kind, from scratch, with the text encoders and the VAE of {base}"
    return f"{base}, all of its transformer fine-tuned"


def _gallery(trained: Trained) -> Iterator[str]:
    if trained.samples:
        yield "<Gallery />"
    if trained.sheet:
        link = f"[{trained.sheet}]({trained.sheet})"
        yield f"{link} shows samples of these prompts during training, next to the base's."


def _of_concept(concept: Mapping[str, Any]) -> str:
    trigger = concept["trigger"]
    return f"- {code(concept['name'])}: " + (f"include {code(trigger)} in the prompt" if trigger else "no trigger word")


def _trigger(trained: Trained) -> str:
    trigger, prompt = trained.contract["trigger"], trained.contract["instance_prompt"]
    lines = ["## Trigger word", ""]
    if concepts := trained.contract.get("concepts"):
        lines = ["## Trigger words", "", *map(_of_concept, concepts)]
    elif trigger:
        lines.append(f"{code(trigger)}: it is in every caption, so include it in the prompt.")
    elif not prompt:
        like = "as for the pictures above" if trained.samples else "as they were written"
        lines.append(f"None was set, and the captions differ: prompt it {like}.")
    if prompt:
        lines.append(f"Every image had one caption, {code(prompt)}: prompt with it, and add to it.")
    return "\n".join(lines)
