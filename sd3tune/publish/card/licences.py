"""The licences of known bases, in the Hub's metadata format.

Source: the headers of the bases' own cards on the Hub, with `license: other`, `license_name` and `license_link`. The
keys are explained at https://huggingface.co/docs/hub/model-cards; diffusers' training scripts link to the same files.
A local file or folder has no known licence: its shape does not prove whose weights it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sd3tune.publish.card.markdown import code
from sd3tune.publish.card.trained import Trained


@dataclass(frozen=True)
class Licence:
    """A licence's title and Hub identifier and, if the Hub does not list it, its own name and link."""

    title: str
    license: str
    name: str | None = None
    link: str | None = None
    note: str = ""

    @property
    def header(self) -> dict[str, str]:
        named = {"license_name": self.name, "license_link": self.link}
        return {"license": self.license, **{key: value for key, value in named.items() if value}}


def _stability(repo_id: str, file: str = "LICENSE.md") -> str:
    return f"https://huggingface.co/stabilityai/{repo_id}/blob/main/{file}"


_COMMUNITY = ("Stability AI Community License", "other", "stabilityai-ai-community")
LICENCES = {
    "stabilityai/stable-diffusion-3.5-medium": Licence(*_COMMUNITY, _stability("stable-diffusion-3.5-medium")),
    "stabilityai/stable-diffusion-3.5-large": Licence(*_COMMUNITY, _stability("stable-diffusion-3.5-large")),
    "stabilityai/stable-diffusion-3.5-large-turbo": Licence(
        *_COMMUNITY, _stability("stable-diffusion-3.5-large-turbo")
    ),
    # The repository in diffusers' layout kept the licence of June 2024; the one in the original layout changed to the
    # new licence in July 2024 (https://stability.ai/news/license-update).
    "stabilityai/stable-diffusion-3-medium-diffusers": Licence(
        "Stability AI Non-Commercial Research Community License",
        "other",
        "stabilityai-nc-research-community",
        _stability("stable-diffusion-3-medium-diffusers", "LICENSE"),
        " Stability AI has since put the model, as published in "
        "[stabilityai/stable-diffusion-3-medium](https://huggingface.co/stabilityai/stable-diffusion-3-medium), under "
        f"its [Community License]({_stability('stable-diffusion-3-medium')}).",
    ),
}
NANO = Licence("Apache License 2.0", "apache-2.0")


def licence_of(contract: Mapping[str, Any]) -> Licence | None:
    """Return the base's licence; None if it is not known."""
    if contract["base_kind"] == "nano":
        return NANO
    return LICENCES.get(contract["base"]) if contract["base_kind"] == "hub" else None


def licence_section(trained: Trained) -> str:
    inside = "The text encoders and the VAE in it are the base's. " if trained.from_scratch else ""
    return f"## Licence\n\n{inside}{_licence(trained.contract)}"


def _licence(contract: Mapping[str, Any]) -> str:
    base, kind, known = code(contract["base"]), contract["base_kind"], licence_of(contract)
    if known:
        title = f"[{known.title}]({known.link})" if known.link else known.title
        return f"The licence of the base, {base}, applies: {title}.{known.note}"
    if kind == "tiny":
        return f"No licence is claimed: the base, {base}, has random weights that sd3tune makes for rehearsals."
    if kind == "hub":
        page = f"[its page](https://huggingface.co/{contract['base']})"
        return f"The licence of the base, {base}, applies; see {page}."
    where = f"The base was a {kind} named {base}, whose licence applies."
    released = contract.get("base_released_as")
    shape = f" Its shape is that of {code(released)}; its weights were not compared." if released else ""
    return f"{where}{shape}"
