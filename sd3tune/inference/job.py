"""One call of `infer` or `generate`: the images' common fields, their number, and the model that draws them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sd3tune.errors import ConfigError
from sd3tune.inference import image_request
from sd3tune.inference.parameters import MEMORY, MODEL, TEXT, Parameter, parameter, parameters_of

MOST_T5_TOKENS = 512
"""The limit of diffusers; SD3 was trained with fewer."""
MOST_IMAGES = 100_000
"""Images of one call for each prompt."""
_DTYPES = ("auto", "fp32", "bf16", "fp16")


def _count(value: int) -> str | None:
    if value < 1:
        return "at least 1"
    return None if value <= MOST_IMAGES else f"at most {MOST_IMAGES}"


def _t5_tokens(value: int | None) -> str | None:
    return None if value is None or 1 <= value <= MOST_T5_TOKENS else f"from 1 to {MOST_T5_TOKENS}"


def read_dtype(value: Any) -> str:
    """Return the name of a dtype, or `auto`. Raises ConfigError."""
    if value not in _DTYPES:
        raise ConfigError(f"--dtype {value}: one of {', '.join(_DTYPES)}")
    return str(value)


@dataclass(frozen=True)
class Memory:
    """Options that save memory or time, at the cost of the other or of exactness."""

    quantize: str | None = parameter(
        None,
        "Quantise the transformer's blocks: nf4, int8 or none; by default as in training.",
        metavar="FORM",
        panel=MEMORY,
        recipe="quantize",
        optional=True,
    )
    """A key of `quantized.FORMS`, or `none`; None takes it from the adapter's contract."""
    t5_8bit: bool | None = parameter(
        None,
        "Hold T5 in 8 bits; by default as in training.",
        flags="--t5-8bit/--no-t5-8bit",
        panel=MEMORY,
        recipe="t5_8bit",
        optional=True,
    )
    """None takes it from the adapter's contract."""
    offload: bool = parameter(False, "Offload idle components to the CPU.", flags="--offload", panel=MEMORY)
    vae_tiling: bool = parameter(
        False,
        "Decode large pictures in tiles.",
        flags="--vae-tiling",
        panel=MEMORY,
        recipe="vae_tiling",
        optional=True,
    )
    compiled: bool = parameter(
        False, "Compile the transformer first, for many pictures.", flags="--compile", panel=MODEL
    )


IN_FULL = Memory()


@dataclass(frozen=True)
class InferenceJob:
    """The images to draw, and the model and adapters that draw them; `from_fields` makes one.

    A field that is None is filled in from the repeated recipe, the adapter's contract, or the model.
    """

    given: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `ImageRequest` that were given, for all images."""
    out: Path = parameter(Path("images"), "Folder for the images.")
    prompts: Path | None = parameter(
        None,
        "A .txt file with one prompt per line, or a .jsonl or .csv file. Images already in --out are not drawn again.",
        metavar="FILE",
    )
    """Values in the file override `given`."""
    grid: Sequence[str] = parameter(
        (),
        "Draw a sheet with one picture for each value, such as weight=0,0.5,1. A second --grid gives the rows. "
        "Also seed, prompt (a|b), lora, steps, guidance, sampler, shift, slg and strength.",
        metavar="NAME=V,V,...",
    )
    """Up to two of `NAME=VALUE,VALUE,...`; see `grid.AXES`."""
    from_picture: Path | None = parameter(
        None,
        "Draw a picture again from the recipe that infer stored in it; other flags override the recipe.",
        flags="--from",
        metavar="PNG",
    )
    look_in: Sequence[Path] = parameter(
        (), "With --from: a folder with the adapter or the start image. Repeatable.", metavar="DIR"
    )
    allow_download: bool = parameter(
        False, "With --from: download missing files from the Hub.", flags="--allow-download"
    )
    batch: int = parameter(1, "How many to draw at once.", recipe="batch", check=_count)
    num: int = parameter(1, "Number of images per prompt.", check=_count)
    before: bool = parameter(
        True, "Also draw without the adapter, for a before/after picture.", flags="--before/--no-before"
    )
    loras: Sequence[str] = parameter(
        (),
        "An adapter: file, adapter folder, checkpoint, run, or a repository on the Hub. Repeatable.",
        flags="--lora",
        metavar="PATH|USER/NAME[:REVISION][@WEIGHT]",
        panel=MODEL,
        recipe="loras",
    )
    embeddings: Sequence[str] = parameter(
        (),
        "Learned tokens: a file with clip_l and clip_g, its folder, a checkpoint, a run, or a repository on the Hub. "
        "Repeatable.",
        flags="--embedding",
        metavar="PATH|USER/NAME[:REVISION]",
        panel=MODEL,
        recipe="embeddings",
    )
    transformer_only: bool = parameter(
        False, "Ignore a file's tensors for the text encoders.", flags="--transformer-only", panel=MODEL
    )
    base: str | None = parameter(
        None, "Base model; by default the one that the adapter names.", panel=MODEL, recipe="base"
    )
    revision: str | None = parameter(None, recipe="base_revision")
    """Revision of a base on the Hub."""
    config: Path | None = parameter(
        None,
        "Take base, text encoders and tokenizers from the model section of this file.",
        metavar="YAML",
        panel=MODEL,
    )
    """`base` overrides its base."""
    t5_tokens: int | None = parameter(
        None,
        "T5's length; by default as in training.",
        metavar="N",
        panel=TEXT,
        recipe="max_sequence_length",
        check=_t5_tokens,
    )
    t5: bool | None = parameter(
        None,
        "Whether T5 reads the prompt; by default as in training.",
        flags="--t5/--no-t5",
        panel=TEXT,
        recipe="encoders",
    )
    """Without T5, its part of the conditioning is zeros."""
    memory: Memory = IN_FULL
    dtype: str = parameter("auto", "auto, fp32, bf16 or fp16.", panel=MODEL, recipe="dtype", read=read_dtype)

    @classmethod
    def from_fields(cls, **values: Any) -> InferenceJob:
        """Make a job from fields of `ImageRequest`, `Memory` and this class; None means not given.

        Raises ConfigError for a value of the wrong type, and TypeError for an unknown field.
        """
        read = {}
        for name, value in values.items():
            if name not in ALL_PARAMETERS:
                close = difflib.get_close_matches(name, ALL_PARAMETERS, n=1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"{name!r} is no field of an image request{hint}")
            if value is not None:
                read[name] = ALL_PARAMETERS[name].read(value)
        given = {name: read.pop(name) for name in image_request.PARAMETERS if name in read}
        memory = Memory(**{option.name: read.pop(option.name) for option in fields(Memory) if option.name in read})
        return cls(given=given, memory=memory, **read)


PARAMETERS = parameters_of(InferenceJob)
MEMORY_PARAMETERS = parameters_of(Memory)
ALL_PARAMETERS: Mapping[str, Parameter] = {**image_request.PARAMETERS, **PARAMETERS, **MEMORY_PARAMETERS}
"""Every field that `from_fields` takes, by name."""
