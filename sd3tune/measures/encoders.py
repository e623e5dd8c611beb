"""Encoders of pictures and prompts: which ones a measurement uses, and how a program brings its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

import sd3tune
from sd3tune.errors import MeasureUnavailable, UserError
from sd3tune.model.base.offline import NANO, offline_kind
from sd3tune.model.base.pretrained import model_source

Measure = Literal["subject", "prompt"]
DREAMBOOTH = "dreambooth"
"""The protocol of Ruiz et al. 2023, with their encoders."""
WITHOUT = "none"
"""The override that leaves an encoder out."""
NANO_CLIP = Path(sd3tune.__file__).parent / "assets" / "nano_clip"
"""Folder of nano's encoder, in transformers' CLIP format."""


class ImageEncoder(Protocol):
    """A model that turns pictures into features."""

    name: str
    """Heading of its column, such as "dinov2"."""
    source: str
    """Hub id and revision, or folder."""

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return features [n, d], fp32 on the CPU, of unit length; each depends on its picture alone."""
        ...


@runtime_checkable
class TextImageEncoder(ImageEncoder, Protocol):
    """A model that turns prompts into features of the same space, too."""

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return features [n, d], fp32 on the CPU, of unit length; each depends on its prompt alone."""
        ...


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder that is not loaded yet."""

    name: str
    source: str
    """Hub id, or local folder in transformers' format."""
    revision: str | None
    measures: tuple[Measure, ...]
    """"subject": fidelity to photos; "prompt": fidelity to prompts, which needs a `TextImageEncoder`."""

    @property
    def label(self) -> str:
        """The source with its revision."""
        return f"{self.source}@{self.revision}" if self.revision else self.source


Load = Callable[[EncoderSpec, torch.device], ImageEncoder]

_CLIP = EncoderSpec(
    "clip", "openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", ("subject", "prompt")
)
PROTOCOL_ENCODERS: tuple[EncoderSpec, ...] = (
    EncoderSpec("dino", "facebook/dino-vits16", "abe3b354cb6a9b6f146096b14a4a9d7eecbcb4bd", ("subject",)),
    _CLIP,
)
"""The encoders of the DreamBooth paper: DINO ViT-S/16 and CLIP ViT-B/32."""
DEFAULT_ENCODERS: tuple[EncoderSpec, ...] = (
    EncoderSpec("dinov2", "facebook/dinov2-small", "ed25f3a31f01632728cabb09d1542f84ab7b0056", ("subject",)),
    _CLIP,
)
NANO_ENCODERS: tuple[EncoderSpec, ...] = (EncoderSpec("nano", NANO, None, ("subject", "prompt")),)

REGISTERED: dict[str, tuple[EncoderSpec, Load]] = {}
"""The encoders of programs, by name."""


def register(spec: EncoderSpec, load: Load) -> None:
    """Add an encoder to every measurement; `load(spec, device)` returns it. Raises ValueError for a name in use."""
    if spec.name in _known():
        raise ValueError(f"an encoder {spec.name!r} exists; choose another name")
    REGISTERED[spec.name] = (spec, load)


def unregister(name: str) -> None:
    """Remove a registered encoder. Raises KeyError if there is none."""
    del REGISTERED[name]


def encoders_for(protocol: str, base: str, overrides: Mapping[str, str]) -> list[EncoderSpec]:
    """Return the encoders of a measurement: nano's for the base nano, else the protocol's, then the registered ones.

    `overrides` maps the name of an encoder to a local folder, to a Hub id with or without `@revision`, or to "none". An
    encoder that is named there and not chosen is added. Raises UserError for an unknown name.
    """
    if offline_kind(base) == NANO and NANO_CLIP.is_dir():
        chosen = NANO_ENCODERS
    else:
        chosen = PROTOCOL_ENCODERS if protocol == DREAMBOOTH else DEFAULT_ENCODERS
    specs = {spec.name: spec for spec in (*chosen, *(spec for spec, _ in REGISTERED.values()))}
    known = _known()
    for name, source in overrides.items():
        if name not in known:
            raise UserError(f"encoder {name!r}: no such encoder; choose from {', '.join(known)}")
        specs[name] = _from(source, known[name])
    return [spec for name, spec in specs.items() if overrides.get(name) != WITHOUT]


def fetch(spec: EncoderSpec) -> None:
    """Download an encoder that is not here yet, without loading it. Raises MeasureUnavailable."""
    from sd3tune.measures.pretrained import folder_of

    if spec.name not in REGISTERED:
        folder_of(spec)


@contextmanager
def loaded(spec: EncoderSpec, device: torch.device | str) -> Iterator[ImageEncoder]:
    """Load an encoder for the body of a `with` statement, and free it at the end: load one at a time.

    Raises MeasureUnavailable, in one line with the way out, if it cannot be had here.
    """
    from sd3tune.measures.pretrained import pretrained

    device = torch.device(device)
    own = REGISTERED.get(spec.name)
    with pretrained(spec, device) if own is None else nullcontext(own[1](spec, device)) as encoder:
        if "prompt" in spec.measures and not isinstance(encoder, TextImageEncoder):
            raise MeasureUnavailable(
                f"{spec.name}: {spec.label}: no text encoder, which prompt fidelity needs; name a CLIP or SigLIP model"
            )
        yield encoder


def _known() -> dict[str, EncoderSpec]:
    own = (spec for spec, _ in REGISTERED.values())
    return {spec.name: spec for spec in (*DEFAULT_ENCODERS, *PROTOCOL_ENCODERS, *NANO_ENCODERS, *own)}


def _from(source: str, spec: EncoderSpec) -> EncoderSpec:
    """Return the encoder with another source; an existing folder is preferred to a Hub id of the same spelling."""
    named = model_source(source)
    return replace(spec, source=named.name, revision=named.revision)
