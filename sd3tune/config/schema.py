"""The whole configuration as strict, frozen models. One sentence a field: effect, unit, cost.

This file is the single source of the defaults, of the JSON Schema and of the config reference. A variant
(method, timesteps, weighting, optimizer, schedule) is one model in a union that `kind` discriminates.
"""

from __future__ import annotations

import re
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

CONFIG_VERSION = 1

OFFLINE_BASES = ("tiny", "tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large")
"""Values of `model.base` that need no download and are never taken for a folder."""


_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


class Section(BaseModel):
    """A part of the configuration: no unknown keys, no coercion, no change after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TextEncodersConfig(Section):
    """Files that hold one text encoder each, as ComfyUI uses them."""

    clip_l: str | None = Field(None, min_length=1, description="CLIP-L, such as `clip_l.safetensors`.")
    clip_g: str | None = Field(None, min_length=1, description="CLIP-G, such as `clip_g.safetensors`.")
    t5: str | None = Field(
        None,
        min_length=1,
        description="T5-XXL, such as `t5xxl_fp16.safetensors`; fp8 files become the run's dtype on loading, so "
        "they save disk and not memory. Not looked at with `t5: false`.",
    )


class ModelConfig(Section):
    """Which base model is trained, and in which precision it is held."""

    base: str = Field(
        "stabilityai/stable-diffusion-3.5-medium",
        min_length=1,
        description="A Hub id, a folder in diffusers' layout, a single `.safetensors` checkpoint, or an offline "
        "base: `tiny` (= `tiny-sd35-medium`), `tiny-sd3`, `tiny-sd35-large`.",
    )
    text_encoders: TextEncodersConfig | None = Field(
        None,
        description="Text encoders from files of their own, instead of those of the base; a single-file "
        "checkpoint without encoders inside needs them.",
    )
    tokenizers: str | None = Field(
        None,
        min_length=1,
        description="A folder or Hub id with `tokenizer`, `tokenizer_2` and `tokenizer_3`; null takes the base's "
        "own, for a single file those of the Hub repository of its variant.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a Hub base; null takes its main branch.")
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto",
        description="Precision of the frozen base: auto is fp32 on the CPU, bf16 on a GPU that has it, else "
        "fp16. The adapter's masters, gradient sums, EMA and optimizer state are fp32 always.",
    )
    quantize: Literal["none"] = Field("none", description="Quantisation of the frozen base: only none so far.")
    max_sequence_length: int = Field(
        256,
        ge=1,
        le=512,
        description="T5 tokens per caption, padding included; the model attends to padding, so this is part "
        "of the conditioning and is stored in the adapter for `infer`.",
    )
    t5: bool = Field(
        True,
        description="Whether T5 is used; false replaces its embeddings by zeros and never loads its 10 GB.",
    )


def _valid_pattern(name: str) -> str:
    if name.startswith("re:"):
        try:
            re.compile(name.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"is not a regular expression: {error}") from None
    return name


def _valid_range(blocks: str) -> str:
    first, dash, last = blocks.partition("-")
    if not (first.isdecimal() and last.isdecimal() and dash) or int(first) > int(last):
        raise ValueError("is not a range of blocks; write the first and the last, such as 0-11")
    return blocks


Rank = Annotated[int, Field(ge=1, le=1024)]
Alpha = Annotated[float, Field(gt=0)]
ModuleName = Annotated[str, Field(min_length=1), AfterValidator(_valid_pattern)]
Pattern = Annotated[str, Field(pattern="^re:."), AfterValidator(_valid_pattern)]
BlockRange = Annotated[str, AfterValidator(_valid_range)]


class LoraConfig(Section):
    """Low-rank adapters on the transformer's linear layers (LoRA, Hu et al. 2021)."""

    kind: Literal["lora"] = Field("lora", description="Train a LoRA adapter.")
    rank: Rank = Field(16, description="Rank of each adapter pair; file size grows in proportion.")
    alpha: Alpha = Field(16.0, description="The adapter's output is scaled by alpha / rank.")
    targets: Literal["attention", "attention-image", "attention+mlp"] | Pattern | list[ModuleName] = Field(
        "attention",
        description="`attention`: every q, k, v and output projection of both streams, `attn2` included; "
        "`attention-image`: those of the image stream alone; `attention+mlp`: also the feed-forward layers, at about "
        "twice the size; else module names or their endings, such as `[attn.to_q, attn.to_v]`, or a regular "
        "expression for full names, `re:transformer_blocks\\.\\d+\\.attn\\..*`. Modules that can never learn are "
        "left out.",
    )
    blocks: list[Annotated[int, Field(ge=0)] | BlockRange] | None = Field(
        None,
        min_length=1,
        description="Transformer blocks to train, counted from 0, such as `[0, 3, 12-23]`; null trains all of them.",
    )
    rank_pattern: dict[ModuleName, Rank] = Field(
        default={},
        description="Other ranks for some modules, such as `{attn2.to_q: 4}`: name, ending or `re:` expression; the "
        "first that fits a module counts.",
    )
    alpha_pattern: dict[ModuleName, Alpha] = Field(
        default={}, description="Other alphas for some modules, written like `rank_pattern`."
    )
    rslora: bool = Field(
        False,
        description="Scale by alpha / sqrt(rank) instead (rank-stabilised LoRA, Kalajdzievski 2023), so that high "
        "ranks learn as fast as low ones.",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of an adapter's inputs that is zeroed while training; previews and the file have none.",
    )
    init: Literal[True, "gaussian", "orthogonal", "eva"] = Field(
        True,
        description="How A starts, while B A = 0 leaves the base as it is: true is PEFT's Kaiming-uniform A; "
        "`gaussian` has standard deviation 1 / rank; `orthogonal` (even ranks) also starts B, in directions that A "
        "does not reach; `eva` takes the main directions of each layer's input over some batches of the data.",
    )
    start_from: str | None = Field(
        None,
        min_length=1,
        description="An adapter to go on from: a file, an adapter folder or a run folder. Its ranks must be those of "
        "this run; alpha may differ, as the training starts from what the file computes.",
    )

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

    @field_validator("init", mode="before")
    @classmethod
    def _harmless_init(cls, init: Any) -> Any:
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
    def _orthogonal_has_even_ranks(self) -> LoraConfig:
        odd = [rank for rank in (self.rank, *self.rank_pattern.values()) if rank % 2]
        if self.init == "orthogonal" and odd:
            raise ValueError(f"init: orthogonal gives half the rank to A and half to B; rank {odd[0]} is not even")
        return self


MethodConfig = LoraConfig


def _placeholders(template: str | None) -> set[str]:
    """The names in braces, format and conversion included; ValueError for unbalanced braces."""
    fields = Formatter().parse(template or "")
    return {
        name + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        for _, name, form, conversion in fields
        if name is not None
    }


class _Source(Section):
    """What all kinds of source have."""

    kind: str
    path: str = Field(min_length=1, examples=["./photos"], description="Where the images are.")
    caption: str | None = Field(None, description="Caption of the images that have none of their own.")
    template: str | None = Field(
        None,
        examples=['"a photo of {trigger}: {caption}"'],
        description="Rewrites every caption of the source: `{caption}` stands for it, `{trigger}` for `data.trigger`, "
        "which is then put nowhere else; null leaves captions to `data.trigger`.",
    )
    repeats: int = Field(1, ge=1, description="How often each image of this source is seen per epoch.")
    weight: float = Field(
        1.0, gt=0, description="Factor on the loss of this source's images; how often they are seen stays the same."
    )
    max_samples: int | None = Field(
        None, ge=1, description="Use this many of the source's images, always the same ones; null uses all."
    )
    prior: None = Field(None, description="Prior preservation; not available yet, keep null.")

    @field_validator("template")
    @classmethod
    def _known_placeholders(cls, template: str | None) -> str | None:
        try:
            unknown = _placeholders(template) - {"caption", "trigger"}
        except ValueError:
            raise ValueError("has a single brace; write {{ or }} for one that is not a placeholder's") from None
        if unknown:
            raise ValueError(f"has {{{min(unknown)}}}; the placeholders are {{caption}} and {{trigger}}")
        return template


class FolderSource(_Source):
    """A folder of images. A caption is taken from `metadata.jsonl` or `metadata.csv` in the folder (columns `file_name`
    and `text`), else from a `.txt` beside the image, else from `caption`.
    """

    kind: Literal["folder"] = Field("folder", description="A folder of images.")


class DatasetSource(_Source):
    """A dataset as the `datasets` library reads it."""

    kind: Literal["dataset"] = Field("dataset", description="A dataset of the Hub or of this machine.")
    path: str = Field(
        min_length=1,
        examples=["./train.parquet"],
        description="A `.parquet` file (or a pattern such as `train-*.parquet`), a folder (from `save_to_disk`, or one "
        "that `load_dataset` reads), or a Hub id.",
    )
    split: str = Field("train", min_length=1, description="Which split; it has no effect on a dataset without splits.")
    revision: str | None = Field(
        None, description="Branch, tag or commit of a Hub dataset; null takes its main branch."
    )
    image_column: str = Field("image", min_length=1, description="The column that holds the images.")
    caption_column: str | None = Field(
        "text", min_length=1, description="The column that holds the captions; null takes `caption` for all."
    )


SourceConfig = Annotated[FolderSource | DatasetSource, Field(discriminator="kind")]


class DataConfig(Section):
    """Images and captions, and how they are cut."""

    sources: list[SourceConfig] = Field(
        min_length=1,
        examples=["[{path: ./photos, caption: a photo of sks dog}]"],
        description="One or more folders of images, or datasets.",
    )
    trigger: str | None = Field(
        None,
        min_length=1,
        examples=["sks"],
        description="A word, or a few, put in front of captions that lack it, as in `sks, a dog on a beach`; stored in "
        "the adapter.",
    )
    resolution: int = Field(
        1024,
        ge=16,
        le=4096,
        description="Side of the square training crop in pixels, a multiple of 16; previews are that square.",
    )
    buckets: bool = Field(
        True,
        description="Cut each image to the nearest of a few shapes of the square's area instead of to the square; a "
        "batch holds one shape. false cuts squares only.",
    )
    crop_variants: int = Field(
        1,
        ge=1,
        le=64,
        description="Crops per image: the first is centred, more are random; each is encoded once.",
    )
    flip: bool = Field(False, description="Also train on mirrored images, encoded as further variants.")
    caption_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of samples trained with the empty caption, which classifier-free guidance starts from.",
    )
    encoder_dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Chance that a text encoder's output is zeros, for each sample and encoder by itself.",
    )
    cache_dir: str | None = Field(
        None,
        description="Where encoded captions and images are kept, shared by runs; null: `$SD3TUNE_CACHE`, "
        "else `.cache/sd3tune` beside the run folder's parent.",
    )

    @field_validator("trigger")
    @classmethod
    def _one_line(cls, trigger: str | None) -> str | None:
        if trigger is not None and (trigger != trigger.strip() or not trigger.isprintable()):
            raise ValueError("has spaces around it or line breaks in it; remove them")
        return trigger

    @model_validator(mode="after")
    def _trigger_is_there(self) -> DataConfig:
        for number, source in enumerate(self.sources):
            if self.trigger is None and "trigger" in _placeholders(source.template):
                raise ValueError(f"sources.{number}.template has {{trigger}}, but data.trigger is not set")
        return self

    @field_validator("resolution")
    @classmethod
    def _multiple_of_16(cls, resolution: int) -> int:
        if resolution % 16:
            low = resolution // 16 * 16
            raise ValueError(f"must be a multiple of 16 (8x VAE, 2x2 patches); {low} or {low + 16} would do")
        return resolution


class LogitNormalConfig(Section):
    """sigma = sigmoid(n), n ~ Normal(mean, std) (Esser et al. 2024, section 3.1)."""

    kind: Literal["logit_normal"] = Field("logit_normal", description="Logit-normal sigmas: the middle is favoured.")
    mean: float = Field(0.0, description="Mean of logit(sigma); positive means more noise.")
    std: float = Field(1.0, gt=0, description="Standard deviation of logit(sigma).")


class UniformConfig(Section):
    """sigma ~ Uniform(0, 1)."""

    kind: Literal["uniform"] = Field("uniform", description="All sigmas equally likely, before the shift.")


class ModeConfig(Section):
    """sigma = u + scale (u - sin^2(pi u / 2)), u uniform (Esser et al. 2024, eq. 20, with u for its 1 - u)."""

    kind: Literal["mode"] = Field("mode", description="Uniform with a heavier middle, and no sigma left out.")
    scale: float = Field(
        1.29,
        ge=-1,
        le=1.75,
        description="Above 0 favours the middle, below 0 the ends; 0 is uniform. Beyond its bounds the map folds back.",
    )


class CosmapConfig(Section):
    """sigma of density 2 / (pi (1 - 2 s + 2 s^2)) (Esser et al. 2024, eq. 21)."""

    kind: Literal["cosmap"] = Field("cosmap", description="The noise levels of a cosine schedule.")


TimestepsConfig = Annotated[LogitNormalConfig | UniformConfig | ModeConfig | CosmapConfig, Field(discriminator="kind")]


class NoWeightingConfig(Section):
    """Every sigma counts the same."""

    kind: Literal["none"] = Field("none", description="The plain velocity loss of rectified flow.")


class MinSnrConfig(Section):
    """min-SNR-gamma in velocity units, min((1 - sigma)^2, gamma sigma^2), of mean 1 (Hang et al. 2023)."""

    kind: Literal["min_snr"] = Field("min_snr", description="Min-SNR weighting, in its rectified-flow form.")
    gamma: float = Field(5.0, gt=0, description="The signal-to-noise ratio at which the weight is clamped.")


class SigmaSqrtConfig(Section):
    """sigma^-2, with sigma at least 1e-3. Its mean is not made 1: without that clamp it would be infinite."""

    kind: Literal["sigma_sqrt"] = Field("sigma_sqrt", description="Favours little noise, steeply.")


class CosmapWeightingConfig(Section):
    """2 / (pi (1 - 2 s + 2 s^2)), of mean 1: with uniform timesteps, what cosmap timesteps do without weighting."""

    kind: Literal["cosmap"] = Field("cosmap", description="Weights as a cosine schedule would draw.")


WeightingConfig = Annotated[
    NoWeightingConfig | MinSnrConfig | SigmaSqrtConfig | CosmapWeightingConfig, Field(discriminator="kind")
]


class MseConfig(Section):
    """The mean of (v - target)^2."""

    kind: Literal["mse"] = Field("mse", description="Squared error.")


class HuberConfig(Section):
    """The mean of d^2 / 2 where |d| < delta, else of delta (|d| - delta / 2), d = v - target (Huber 1964)."""

    kind: Literal["huber"] = Field("huber", description="Squared error near the target, absolute error far from it.")
    delta: float = Field(
        1.0, gt=0, description="Error at which the loss turns linear; the data and the noise have a spread of about 1."
    )


LossConfig = Annotated[MseConfig | HuberConfig, Field(discriminator="kind")]


class FlowConfig(Section):
    """The rectified-flow objective. sigma 1 is noise."""

    timesteps: TimestepsConfig = Field(default_factory=LogitNormalConfig, description="How sigma is drawn.")
    shift: Literal["model", "resolution"] | Annotated[float, Field(gt=0)] = Field(
        "model",
        description="Maps sigma to shift*s / (1 + (shift-1)*s) after drawing; `model` is the base "
        "scheduler's own (3.0 for SD3), 1.0 leaves sigma as drawn; `resolution` is the base's own times "
        "sqrt(pixels / 1024^2), so that smaller images get less noise.",
    )
    min_sigma: float = Field(0.0, ge=0, lt=1, description="Smallest sigma in training, after the shift.")
    max_sigma: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Largest sigma in training. The density between the two is kept and scaled up, nothing piles up.",
    )
    weighting: WeightingConfig = Field(default_factory=NoWeightingConfig, description="Weight of the loss by sigma.")
    loss: LossConfig = Field(default_factory=MseConfig, description="Distance between velocities.")
    noise_offset: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Strength of a constant added to the noise of each image and channel, which teaches overall "
        "brightness; 0 turns it off, 0.05 is much.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> FlowConfig:
        if self.timesteps.kind == "cosmap" and self.weighting.kind == "cosmap":
            raise ValueError(
                "cosmap timesteps with cosmap weighting count the same thing twice; make one of them plain"
            )
        if self.min_sigma >= self.max_sigma:
            raise ValueError(f"min_sigma {self.min_sigma:g} must be below max_sigma {self.max_sigma:g}")
        return self


class AdamWConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), fused."""

    kind: Literal["adamw"] = Field("adamw", description="Fused AdamW on one flat fp32 master.")
    lr: float = Field(1e-4, gt=0, description="Peak learning rate.")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        default=[0.9, 0.999], min_length=2, max_length=2, description="Decay rates of the two moments."
    )
    eps: float = Field(1e-8, gt=0, description="Added to the denominator.")
    weight_decay: float = Field(1e-4, ge=0, description="Decoupled weight decay, multiplied by the learning rate.")


OptimizerConfig = AdamWConfig


class ConstantConfig(Section):
    """The same learning rate throughout, after the warm-up."""

    kind: Literal["constant"] = Field("constant", description="Constant learning rate.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly to its peak.")


class CosineConfig(Section):
    """Half a cosine from the peak to zero, after the warm-up."""

    kind: Literal["cosine"] = Field("cosine", description="Cosine decay to zero at the last step.")
    warmup_steps: int = Field(0, ge=0, description="Steps over which the learning rate rises linearly to its peak.")


ScheduleConfig = Annotated[ConstantConfig | CosineConfig, Field(discriminator="kind")]


class TrainConfig(Section):
    """Length, batch and memory of the training."""

    steps: int | None = Field(1000, ge=1, description="Optimizer steps; null, or left out, when `epochs` is given.")
    epochs: float | None = Field(
        None,
        gt=0,
        description="The length in passes over the data, repeats counted, instead of `steps`; rounded up to a step.",
    )
    batch_size: int = Field(1, ge=1, description="Images per process and forward pass.")
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes per optimizer step; multiplies the batch at no memory."
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are scaled down to this norm; null leaves them."
    )
    gradient_checkpointing: Literal["none", "block"] = Field(
        "none",
        description="`block` recomputes each transformer block in the backward pass: a tenth of the "
        "activations for a third more time.",
    )
    log_every: int = Field(10, ge=1, description="Steps between refreshes of the progress line and metrics file.")

    @model_validator(mode="before")
    @classmethod
    def _epochs_replace_the_default(cls, values: Any) -> Any:
        given = isinstance(values, dict) and values.get("epochs") is not None
        return {**values, "steps": values.get("steps")} if given else values

    @property
    def total_steps(self) -> int:
        """The number of optimizer steps. Known only once `epochs` was resolved against the data."""
        if self.steps is None:
            raise ValueError("train.epochs has not been resolved into steps")
        return self.steps


class EmaConfig(Section):
    """An exponential moving average of the adapter, in fp32."""

    decay: float = Field(0.99, ge=0, lt=1, description="Decay per step, reached through min(decay, (1+t)/(10+t)).")


class CheckpointConfig(Section):
    """What a stopped run resumes from."""

    every: int = Field(500, ge=1, description="Steps between checkpoints; the last step is always saved.")
    keep: int = Field(3, ge=1, description="How many of the newest checkpoints are kept.")


class PreviewConfig(Section):
    """Images drawn while training, by the sampler that `infer` uses."""

    every: int = Field(100, ge=1, description="Steps between previews; also before the first and after the last step.")
    prompts: list[Annotated[str, Field(min_length=1)]] = Field(
        default=[], description="One image a prompt; an empty list draws nothing."
    )
    steps: int = Field(28, ge=1, le=1000, description="Denoising steps per image.")
    guidance: float = Field(7.0, ge=0, description="Classifier-free guidance scale; 1 or less turns it off.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the first prompt's noise; the next has seed + 1.")


class ValidationConfig(Section):
    """Held-out loss."""

    holdout: int = Field(0, ge=0, le=0, description="Images held out; only 0 (none) so far.")


class TrackingConfig(Section):
    """Where curves go besides `metrics.jsonl`."""

    kind: Literal["none"] = Field("none", description="Only none so far: `metrics.jsonl` holds everything.")


class HubConfig(Section):
    """Upload of the finished adapter."""

    repo_id: None = Field(None, description="Target repository; not available yet, keep null.")
    private: bool = Field(True, description="Whether a created repository is private.")
    push: Literal["never"] = Field("never", description="When to upload: only never so far.")


class Config(Section):
    """A run of sd3tune."""

    config_version: int = Field(
        CONFIG_VERSION, ge=1, le=CONFIG_VERSION, description="Version of this format; a newer one is refused."
    )
    name: str = Field(
        "my-lora",
        max_length=100,
        description="Name of the run and of its folder: letters, digits, `.`, `_` and `-`.",
        json_schema_extra={"pattern": _NAME.pattern},
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Order, crops, sigmas, noise and initial weights follow from it.")
    output_dir: str | None = Field(
        None,
        description="The run folder, relative to the YAML file; null: `runs/{name}` where sd3tune starts.",
    )
    model: ModelConfig = Field(default_factory=ModelConfig, description="The base model.")
    method: MethodConfig = Field(default_factory=LoraConfig, description="What is trained.")
    data: DataConfig = Field(
        examples=["{sources: [{path: ./photos, caption: a photo of sks dog}]}"],
        description="What it is trained on.",
    )
    flow: FlowConfig = Field(default_factory=FlowConfig, description="The objective.")
    optimizer: OptimizerConfig = Field(default_factory=AdamWConfig, description="How weights are updated.")
    schedule: ScheduleConfig = Field(default_factory=ConstantConfig, description="Learning rate over time.")
    train: TrainConfig = Field(default_factory=TrainConfig, description="Length, batch and memory.")
    ema: EmaConfig | None = Field(None, description="Average the adapter; null turns it off.")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="What a run resumes from.")
    preview: PreviewConfig = Field(default_factory=PreviewConfig, description="Images while training.")
    validation: ValidationConfig = Field(default_factory=ValidationConfig, description="Held-out loss.")
    tracking: TrackingConfig = Field(default_factory=TrackingConfig, description="Experiment trackers.")
    hub: HubConfig = Field(default_factory=HubConfig, description="Upload.")

    @field_validator("name")
    @classmethod
    def _a_folder_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError("cannot name a folder; use letters, digits, '.', '_' and '-', a letter or digit first")
        return name

    @model_validator(mode="after")
    def _one_length(self) -> Config:
        steps, epochs = self.train.steps, self.train.epochs
        if steps is not None and epochs is not None:
            raise ValueError(
                f"train.steps is {steps} and train.epochs is {epochs:g}: both say how long to train; leave one out, "
                "or set it to null"
            )
        if steps is None and epochs is None:
            raise ValueError("train.steps and train.epochs are both null; give one of them a number")
        return self

    @model_validator(mode="after")
    def _warmup_fits(self) -> Config:
        if self.train.steps is not None and not self.warmup_fits(self.train.steps):
            raise ValueError(
                f"schedule.warmup_steps is {self.schedule.warmup_steps} but train.steps is "
                f"{self.train.steps}: the learning rate would never reach its peak; warm up for fewer steps"
            )
        return self

    def warmup_fits(self, steps: int) -> bool:
        """Whether a run of that many steps reaches its peak learning rate."""
        return self.schedule.warmup_steps < steps
