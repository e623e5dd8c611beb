"""Keys that all adapters on the transformer share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from sd3tune.config.sections.key import Identity, Key
from sd3tune.config.sections.method_section import MethodSection
from sd3tune.config.sections.text_encoders import Alpha, EncoderLoraConfig, Rank


def _valid_pattern(name: str) -> str:
    if name.startswith("re:"):
        try:
            re.compile(name.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise ValueError(f"is not a regular expression: {reason}") from None
    return name


def _valid_range(blocks: str) -> str:
    first, dash, last = blocks.partition("-")
    if not (first.isdecimal() and last.isdecimal() and dash) or int(first) > int(last):
        raise ValueError("is not a range of blocks; write the first and the last, such as 0-11")
    return blocks


STATED = Key(Identity.WRITTEN, contract=True)
OF_RANKS = Key(Identity.WRITTEN, contract=True, of_ranks=True)
ADDED = Key(Identity.WRITTEN, contract=True, added=True)
OF_THE_FILE = Key(Identity.WRITTEN, contract=True, of_ranks=True, added=True)

DROPOUT = Field(
    0.0,
    ge=0,
    lt=1,
    description="Share of an adapter's inputs that is zeroed in training; previews and the saved file have no dropout.",
)
START_FROM = Field(
    None,
    min_length=1,
    description="Adapter to continue from: a file, an adapter folder or a run folder. Its ranks must match this run; "
    "alpha may differ, as the training starts from the file's output.",
)

ModuleName = Annotated[str, Field(min_length=1), AfterValidator(_valid_pattern)]
Pattern = Annotated[str, Field(pattern="^re:."), AfterValidator(_valid_pattern)]
BlockRange = Annotated[str, AfterValidator(_valid_range)]
Blocks = list[Annotated[int, Field(ge=0)] | BlockRange]
ExportDtype = Literal["fp32", "bf16", "fp16"]


class AdapterSection(MethodSection):
    """Keys of every adapter on the transformer's linear layers."""

    rank: Annotated[Rank, OF_RANKS] = Field(
        16, description="Rank of each adapter pair; file size is proportional to it."
    )
    alpha: Annotated[Alpha, OF_RANKS] = Field(16.0, description="The adapter's output is scaled by alpha / rank.")
    targets: Annotated[
        Literal["attention", "attention-image", "attention+mlp"] | Pattern | list[ModuleName], STATED
    ] = Field(
        "attention",
        description="`attention`: every q, k, v and output projection of both streams, `attn2` included; "
        "`attention-image`: only the projections of the image stream; `attention+mlp`: also the feed-forward layers, "
        "at about twice the size. Or a list of module names or name endings, such as `[attn.to_q, attn.to_v]`, or a "
        "regular expression for full names, `re:transformer_blocks\\.\\d+\\.attn\\..*`. Modules that cannot learn are "
        "left out.",
    )
    blocks: Annotated[Blocks | None, STATED] = Field(
        None,
        min_length=1,
        description="Transformer blocks to train, counted from 0, such as `[0, 3, 12-23]`; null trains all of them.",
    )
    rank_pattern: Annotated[dict[ModuleName, Rank], OF_RANKS] = Field(
        default={},
        description="Other ranks for some modules, such as `{attn2.to_q: 4}`: by name, name ending or `re:` "
        "expression; the first match counts.",
    )
    alpha_pattern: Annotated[dict[ModuleName, Alpha], OF_RANKS] = Field(
        default={}, description="Other alphas for some modules, written like `rank_pattern`."
    )
    export_dtype: Annotated[ExportDtype, OF_THE_FILE] = Field(
        "fp32",
        description="Precision of the adapter file; previews and reports use the written weights. bf16 and fp16 have "
        "half of fp32's size, fp16 with eight times the precision of bf16; checkpoints are always fp32.",
    )

    @property
    def rank_stabilised(self) -> bool:
        """True if the scale is alpha / sqrt(rank) instead of alpha / rank."""
        return False

    @property
    def trained_encoders(self) -> dict[str, EncoderLoraConfig]:
        """Text encoder -> settings, for the trained encoders."""
        return {}

    @field_validator("targets", mode="before")
    @classmethod
    def _known_targets(cls, targets: Any) -> Any:
        if targets == []:
            raise ValueError("is empty: nothing would be trained; use `attention` or name at least one module")
        presets = ("attention", "attention-image", "attention+mlp")
        if not isinstance(targets, str | list):
            raise ValueError("is not a preset, a list of module names or an expression that begins with re:")
        if isinstance(targets, str) and targets not in presets and not targets.startswith("re:"):
            raise ValueError(
                f"is not one of: {', '.join(presets)}; put module names in a list, [{targets}], and begin a regular "
                "expression with re:"
            )
        return targets
