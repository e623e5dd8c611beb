"""`method`: the training method."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from sd3tune.config.sections.key import TRAINING, WRITTEN, Identity, Key, is_any_path
from sd3tune.config.sections.learned_token import LearnedTokenKeys, PivotConfig
from sd3tune.config.sections.method_section import MethodSection
from sd3tune.config.sections.text_encoders import Alpha, EncoderLoraConfig, Rank, TrainedEncodersConfig


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


_STATED = Key(Identity.WRITTEN, contract=True)
_OF_RANKS = Key(Identity.WRITTEN, contract=True, of_ranks=True)
_ADDED = Key(Identity.WRITTEN, contract=True, added=True)
_OF_THE_FILE = Key(Identity.WRITTEN, contract=True, of_ranks=True, added=True)

ModuleName = Annotated[str, Field(min_length=1), AfterValidator(_valid_pattern)]
Pattern = Annotated[str, Field(pattern="^re:."), AfterValidator(_valid_pattern)]
BlockRange = Annotated[str, AfterValidator(_valid_range)]
Blocks = list[Annotated[int, Field(ge=0)] | BlockRange]
ExportDtype = Literal["fp32", "bf16", "fp16"]


class AdapterSection(MethodSection):
    """Keys of every adapter on the transformer's linear layers."""

    rank: Annotated[Rank, _OF_RANKS] = Field(
        16, description="Rank of each adapter pair; file size is proportional to it."
    )
    alpha: Annotated[Alpha, _OF_RANKS] = Field(16.0, description="The adapter's output is scaled by alpha / rank.")
    targets: Annotated[
        Literal["attention", "attention-image", "attention+mlp"] | Pattern | list[ModuleName], _STATED
    ] = Field(
        "attention",
        description="`attention`: every q, k, v and output projection of both streams, `attn2` included; "
        "`attention-image`: only the projections of the image stream; `attention+mlp`: also the feed-forward layers, "
        "at about twice the size. Or a list of module names or name endings, such as `[attn.to_q, attn.to_v]`, or a "
        "regular expression for full names, `re:transformer_blocks\\.\\d+\\.attn\\..*`. Modules that cannot learn are "
        "left out.",
    )
    blocks: Annotated[Blocks | None, _STATED] = Field(
        None,
        min_length=1,
        description="Transformer blocks to train, counted from 0, such as `[0, 3, 12-23]`; null trains all of them.",
    )
    rank_pattern: Annotated[dict[ModuleName, Rank], _OF_RANKS] = Field(
        default={},
        description="Other ranks for some modules, such as `{attn2.to_q: 4}`: by name, name ending or `re:` "
        "expression; the first match counts.",
    )
    alpha_pattern: Annotated[dict[ModuleName, Alpha], _OF_RANKS] = Field(
        default={}, description="Other alphas for some modules, written like `rank_pattern`."
    )
    export_dtype: Annotated[ExportDtype, _OF_THE_FILE] = Field(
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


class LowRankSection(AdapterSection):
    """Keys of the methods whose adapter is LoRA's."""

    rank: Annotated[Rank | Literal["auto"], _OF_RANKS] = Field(  # type: ignore[assignment]
        16,
        description="Rank of each adapter pair; file size is proportional to it. `auto` gives each module its own, by "
        "the norm of its weight's gradient over a few images, within `budget_mb`.",
    )
    budget_mb: Annotated[float | None, Key(Identity.WRITTEN, contract=True, of_ranks=True, added=True)] = Field(
        None, gt=0, description="With `rank: auto`, the size of the adapter's tensors in the file, in MB."
    )
    rslora: Annotated[bool, _OF_RANKS] = Field(
        False,
        description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA, Kalajdzievski 2023), so that high "
        "ranks learn as fast as low ones.",
    )
    dropout: Annotated[float, _STATED] = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of an adapter's inputs that is zeroed in training; previews and the saved file have no "
        "dropout.",
    )
    init: Annotated[Literal[True, "gaussian", "orthogonal", "eva"], _STATED] = Field(
        True,
        description="Initialisation of A; B A = 0 in all cases. true is PEFT's Kaiming-uniform A; `gaussian` has "
        "standard deviation 1 / rank; `orthogonal` (even ranks) also initialises B, orthogonal to A; `eva` uses the "
        "principal directions of each layer's input over some batches of the data.",
    )
    loraplus_lr_ratio: Annotated[float, _ADDED] = Field(
        1.0,
        gt=0,
        description="The learning rate of B as a multiple of `optimizer.lr`, A's (LoRA+, Hayou et al. 2024, who take "
        "16); 1 trains both at one rate.",
    )
    start_from: Annotated[str | None, Key(Identity.RESOLVED, path=is_any_path)] = Field(
        None,
        min_length=1,
        description="Adapter to continue from: a file, an adapter folder or a run folder. Its ranks must match this "
        "run; alpha may differ, as the training starts from the file's output.",
    )

    @property
    def rank_stabilised(self) -> bool:
        return self.rslora

    @property
    def has_rates(self) -> bool:
        return self.loraplus_lr_ratio != 1

    @property
    def draws_in_blocks(self) -> bool:
        return self.dropout > 0

    @field_validator("init", mode="before")
    @classmethod
    def _init_keeps_base(cls, init: Any) -> Any:
        name = init.lower().replace("-", "_") if isinstance(init, str) else ""
        if name.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise ValueError(
                "changes the base's weights, so the saved adapter would be wrong on the real base; use true, "
                "gaussian, orthogonal or eva"
            )
        if init is not True and init not in ("gaussian", "orthogonal", "eva"):
            raise ValueError("is not one of: true, gaussian, orthogonal, eva")
        return init

    @model_validator(mode="after")
    def _orthogonal_has_even_ranks(self) -> LowRankSection:
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank == "auto" or rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init: orthogonal gives half the rank to A and half to B; rank {odd[0]} is not even")
        return self

    @model_validator(mode="after")
    def _budget_is_for_automatic_ranks(self) -> LowRankSection:
        if (self.rank == "auto") != (self.budget_mb is not None):
            missing = "budget_mb is not set" if self.rank == "auto" else f"rank is {self.rank}"
            raise ValueError(f"rank: auto and budget_mb go together, and {missing}; set both, or a number as rank")
        given = [key for key in ("rank_pattern", "start_from") if getattr(self, key)]
        if self.rank == "auto" and given:
            raise ValueError(
                f"rank: auto chooses all ranks, so it does not go with {given[0]}; leave one of the two out"
            )
        return self


class LoraConfig(LowRankSection):
    """Low-rank adapters on the transformer's linear layers (LoRA, Hu et al. 2021)."""

    kind: Annotated[Literal["lora"], WRITTEN] = Field("lora", description="Train a LoRA adapter.")
    text_encoders: Annotated[
        TrainedEncodersConfig | None, Key(Identity.WRITTEN, contract=True, of_ranks=True, added=True, phases=TRAINING)
    ] = Field(
        None,
        description="CLIP encoders to train with adapters of their own, in the same file; null trains none. Their "
        "captions are encoded in every step, and `train.hoist` has no effect.",
    )

    @property
    def has_rates(self) -> bool:
        return super().has_rates or self.text_encoders is not None

    @property
    def trained_encoders(self) -> dict[str, EncoderLoraConfig]:
        return {} if self.text_encoders is None else self.text_encoders.trained

    @property
    def trains_text(self) -> bool:
        return self.text_encoders is not None


class DoraConfig(LoraConfig):
    """LoRA with a trained magnitude for each output of a layer (DoRA, Liu et al. 2024)."""

    reads_base: ClassVar[bool] = True

    kind: Annotated[Literal["dora"], WRITTEN] = Field(  # type: ignore[assignment]
        "dora", description="Train a DoRA adapter."
    )


class LohaConfig(AdapterSection):
    """The elementwise product of two low-rank matrices for each layer (LoHa; FedPara, Hyeon-Woo et al. 2022)."""

    fits_packed_base: ClassVar[bool] = False

    kind: Annotated[Literal["loha"], WRITTEN] = Field("loha", description="Train a LoHa adapter.")


class LokrConfig(AdapterSection):
    """The Kronecker product of a small and a larger, low-rank matrix for each layer (LoKr, Yeh et al. 2024)."""

    fits_packed_base: ClassVar[bool] = False

    kind: Annotated[Literal["lokr"], WRITTEN] = Field("lokr", description="Train a LoKr adapter.")
    factor: Annotated[int, _OF_RANKS] = Field(
        -1,
        description="Rows and columns of the small matrix, where they divide the layer's; -1 takes the divisor nearest "
        "to the square root. A smaller factor trains more parameters.",
    )
    decompose_both: Annotated[bool, _OF_RANKS] = Field(
        False, description="Also give the small matrix a low rank, where that has fewer parameters."
    )

    @field_validator("factor")
    @classmethod
    def _factor_divides(cls, factor: int) -> int:
        if factor < 2 and factor != -1:
            raise ValueError("is not a divisor; give 2 or more, or -1 for the one nearest to the square root")
        return factor


class FullConfig(MethodSection):
    """Train every transformer parameter: full fine-tuning or, with `model.init: random`, training from scratch."""

    freezes_base: ClassVar[bool] = False
    makes_adapter: ClassVar[bool] = False

    kind: Annotated[Literal["full"], WRITTEN] = Field(
        "full", description="Train the whole transformer, and write a whole model."
    )
    blocks: Annotated[Blocks | None, WRITTEN] = Field(
        None,
        min_length=1,
        description="Transformer blocks to train, counted from 0, such as `[0, 3, 12-23]`; the rest of the transformer "
        "is frozen. null trains everything.",
    )
    export_dtype: Annotated[ExportDtype, _STATED] = Field(
        "fp16",
        description="Precision of the transformer in `model/`; previews and reports use the written weights. fp16 has "
        "half of fp32's size and eight times the precision of bf16; checkpoints are always fp32.",
    )


class TextualInversionConfig(LearnedTokenKeys, MethodSection):
    """New words for CLIP-L and CLIP-G: a few embedding vectors; transformer and encoders stay as they are."""

    makes_adapter: ClassVar[bool] = False
    usual_lr: ClassVar[float | None] = 5e-3

    kind: Annotated[Literal["textual_inversion"], WRITTEN] = Field(
        "textual_inversion", description="Learn the embedding of a token."
    )

    @property
    def learned_token(self) -> LearnedTokenKeys:
        return self

    @property
    def trains_text(self) -> bool:
        return True


class PivotalConfig(LowRankSection):
    """A new word for CLIP-L and CLIP-G, and LoRA on the transformer; the word is frozen before the end."""

    gives_rates: ClassVar[str] = "method.kind pivotal gives parameters"

    kind: Annotated[Literal["pivotal"], WRITTEN] = Field(
        "pivotal", description="Learn the embedding of a token, and a LoRA adapter with it."
    )
    embedding: Annotated[PivotConfig, WRITTEN] = Field(
        default=PivotConfig(), description="The token and its vectors, in a file of its own beside the adapter."
    )

    @property
    def learned_token(self) -> LearnedTokenKeys:
        return self.embedding

    @property
    def has_rates(self) -> bool:
        return True

    @property
    def trains_text(self) -> bool:
        return True

    @property
    def depends_on_length(self) -> bool:
        return self.embedding.until < 1


METHOD_SECTIONS = (LoraConfig, DoraConfig, LohaConfig, LokrConfig, FullConfig, TextualInversionConfig, PivotalConfig)
MethodConfig = Annotated[
    LoraConfig | DoraConfig | LohaConfig | LokrConfig | FullConfig | TextualInversionConfig | PivotalConfig,
    Field(discriminator="kind"),
]
