"""`method`: the training method."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from sd3tune.config.sections.adapter_section import (
    ADDED,
    DROPOUT,
    OF_RANKS,
    START_FROM,
    STATED,
    AdapterSection,
    Blocks,
    ExportDtype,
)
from sd3tune.config.sections.key import TRAINING, WRITTEN, Identity, Key, is_any_path
from sd3tune.config.sections.learned_token import LearnedTokenKeys, PivotConfig
from sd3tune.config.sections.method_section import MethodSection
from sd3tune.config.sections.text_encoders import EncoderLoraConfig, Rank, TrainedEncodersConfig


class LowRankSection(AdapterSection):
    """Keys of the methods whose adapter is LoRA's."""

    rank: Annotated[Rank | Literal["auto"], OF_RANKS] = Field(  # type: ignore[assignment]
        16,
        description="Rank of each adapter pair; file size is proportional to it. `auto` gives each module its own, by "
        "the norm of its weight's gradient over a few images, within `budget_mb`.",
    )
    budget_mb: Annotated[float | None, Key(Identity.WRITTEN, contract=True, of_ranks=True, added=True)] = Field(
        None, gt=0, description="With `rank: auto`, the size of the adapter's tensors in the file, in MB."
    )
    rslora: Annotated[bool, OF_RANKS] = Field(
        False,
        description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA, Kalajdzievski 2023), so that high "
        "ranks learn as fast as low ones.",
    )
    dropout: Annotated[float, STATED] = DROPOUT
    init: Annotated[Literal[True, "gaussian", "orthogonal", "eva"], STATED] = Field(
        True,
        description="Initialisation of A; B A = 0 in all cases. true is PEFT's Kaiming-uniform A; `gaussian` has "
        "standard deviation 1 / rank; `orthogonal` (even ranks) also initialises B, orthogonal to A; `eva` uses the "
        "principal directions of each layer's input over some batches of the data.",
    )
    loraplus_lr_ratio: Annotated[float, ADDED] = Field(
        1.0,
        gt=0,
        description="The learning rate of B as a multiple of `optimizer.lr`, A's (LoRA+, Hayou et al. 2024, who take "
        "16); 1 trains both at one rate.",
    )
    start_from: Annotated[str | None, Key(Identity.RESOLVED, path=is_any_path)] = START_FROM

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


class LycorisSection(AdapterSection):
    """Keys of the adapters that LyCORIS brought: LoHa and LoKr."""

    fits_packed_base: ClassVar[bool] = False

    dropout: Annotated[float, ADDED] = DROPOUT
    init: Annotated[Literal[True, "lycoris"], ADDED] = Field(
        True,
        description="Initialisation; the change of the weights is zero in both cases. true is PEFT's: one matrix is "
        "zero and the others Kaiming-uniform. `lycoris` is LyCORIS': LoHa's matrices are normal, with larger values, "
        "and another matrix is zero.",
    )
    start_from: Annotated[str | None, Key(Identity.RESOLVED, path=is_any_path, added=True)] = START_FROM

    @property
    def draws_in_blocks(self) -> bool:
        return self.dropout > 0

    @field_validator("init", mode="before")
    @classmethod
    def _init_is_not_of_lora(cls, init: Any) -> Any:
        if init is not True and init != "lycoris":
            raise ValueError("is not one of: true, lycoris; LoRA's others are for its factors A and B")
        return init


class LohaConfig(LycorisSection):
    """The elementwise product of two low-rank matrices for each layer (LoHa; FedPara, Hyeon-Woo et al. 2022)."""

    kind: Annotated[Literal["loha"], WRITTEN] = Field("loha", description="Train a LoHa adapter.")


class LokrConfig(LycorisSection):
    """The Kronecker product of a small and a larger, low-rank matrix for each layer (LoKr, Yeh et al. 2024)."""

    kind: Annotated[Literal["lokr"], WRITTEN] = Field("lokr", description="Train a LoKr adapter.")
    factor: Annotated[int, OF_RANKS] = Field(
        -1,
        description="Rows and columns of the small matrix, where they divide the layer's; -1 takes the divisor nearest "
        "to the square root. A smaller factor trains more parameters.",
    )
    decompose_both: Annotated[bool, OF_RANKS] = Field(
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
    export_dtype: Annotated[ExportDtype, STATED] = Field(
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
