"""`flow`: the objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from sd3tune.config.sections.key import RESOLVED, WRITTEN, Identity, Key
from sd3tune.config.sections.section import Section

_STATED = Key(Identity.WRITTEN, contract=True)


class TimestepsSection(Section):
    """Fields shared by all densities of sigma."""

    kind: str

    @property
    def densities(self) -> Sequence[TimestepsSection]:
        """The densities that it consists of."""
        return [self]


class WeightingSection(Section):
    """Fields shared by all weightings."""

    kind: str
    normalised: ClassVar[bool] = True
    """True if the weight is divided by its mean over the training sigmas."""


class LossSection(Section):
    """Fields shared by all losses."""

    kind: str
    estimates_mean: ClassVar[bool] = False
    """True if the optimum is the mean velocity, which the flow needs."""

    @property
    def depends_on_length(self) -> bool:
        """True if the loss depends on the length of the run, which then cannot be extended."""
        return False


class LogitNormalConfig(TimestepsSection):
    """sigma = sigmoid(n), n ~ Normal(mean, std) (Esser et al. 2024, section 3.1)."""

    kind: Annotated[Literal["logit_normal"], WRITTEN] = Field(
        "logit_normal", description="Logit-normal sigmas, which favour the middle."
    )
    mean: Annotated[float, WRITTEN] = Field(0.0, description="Mean of logit(sigma); positive means more noise.")
    std: Annotated[float, WRITTEN] = Field(1.0, gt=0, description="Standard deviation of logit(sigma).")


class UniformConfig(TimestepsSection):
    """sigma ~ Uniform(0, 1)."""

    kind: Annotated[Literal["uniform"], WRITTEN] = Field(
        "uniform", description="All sigmas equally likely, before the shift."
    )


class ModeConfig(TimestepsSection):
    """sigma = u + scale (u - sin^2(pi u / 2)), u uniform (Esser et al. 2024, eq. 20, with u for its 1 - u)."""

    kind: Annotated[Literal["mode"], WRITTEN] = Field(
        "mode", description="Uniform with a heavier middle; every sigma can occur."
    )
    scale: Annotated[float, WRITTEN] = Field(
        1.29,
        ge=-1,
        le=1.75,
        description="Above 0 favours the middle, below 0 the ends; 0 is uniform. Beyond the bounds, the map is not "
        "monotonic.",
    )


class CosmapConfig(TimestepsSection):
    """sigma with density 2 / (pi (1 - 2 s + 2 s^2)) (Esser et al. 2024, eq. 21)."""

    kind: Annotated[Literal["cosmap"], WRITTEN] = Field("cosmap", description="The noise levels of a cosine schedule.")


class BetaConfig(TimestepsSection):
    """sigma ~ Beta(alpha, beta), with mean alpha / (alpha + beta)."""

    kind: Annotated[Literal["beta"], WRITTEN] = Field(
        "beta", description="Beta sigmas: one hump, or mass at both ends if both numbers are below 1."
    )
    alpha: Annotated[float, WRITTEN] = Field(
        2.0, ge=0.05, le=100, description="Above `beta` means more noise; below 1, sigmas near 0 are the most likely."
    )
    beta: Annotated[float, WRITTEN] = Field(
        2.0, ge=0.05, le=100, description="Above `alpha` means less noise; below 1, sigmas near 1 are the most likely."
    )


Density = Annotated[
    LogitNormalConfig | UniformConfig | ModeConfig | CosmapConfig | BetaConfig, Field(discriminator="kind")
]


class MixtureConfig(TimestepsSection):
    """Each sigma comes from one of several densities, which all precede the shift."""

    kind: Annotated[Literal["mixture"], WRITTEN] = Field(
        "mixture", description="Several densities; half logit-normal, half uniform unless told otherwise."
    )
    parts: Annotated[list[Density], WRITTEN] = Field(
        default=[LogitNormalConfig(), UniformConfig()],
        min_length=2,
        description="The densities, such as `[{kind: logit_normal, mean: -0.5}, {kind: uniform}]`.",
    )
    shares: Annotated[list[Annotated[float, Field(gt=0)]] | None, WRITTEN] = Field(
        None, description="How often each part is drawn, such as `[3, 1]`, as relative numbers; null: equally often."
    )

    @property
    def densities(self) -> Sequence[TimestepsSection]:
        return self.parts

    @model_validator(mode="after")
    def _share_for_each_part(self) -> MixtureConfig:
        if self.shares is not None and len(self.shares) != len(self.parts):
            raise ValueError(
                f"shares has length {len(self.shares)} and parts {len(self.parts)}; give each part one share"
            )
        return self


TimestepsConfig = Annotated[
    LogitNormalConfig | UniformConfig | ModeConfig | CosmapConfig | BetaConfig | MixtureConfig,
    Field(discriminator="kind"),
]


class NoWeightingConfig(WeightingSection):
    """Equal weight for every sigma."""

    normalised: ClassVar[bool] = False

    kind: Annotated[Literal["none"], WRITTEN] = Field("none", description="Plain velocity loss of rectified flow.")


class MinSnrConfig(WeightingSection):
    """min-SNR-gamma in velocity units, min((1 - sigma)^2, gamma sigma^2), with mean 1 (Hang et al. 2023)."""

    kind: Annotated[Literal["min_snr"], WRITTEN] = Field(
        "min_snr", description="Min-SNR weighting, in its rectified-flow form."
    )
    gamma: Annotated[float, WRITTEN] = Field(
        5.0, gt=0, description="Signal-to-noise ratio at which the weight is clamped."
    )


class SigmaSqrtConfig(WeightingSection):
    """sigma^-2, with sigma at least 1e-3. The mean is not normalised to 1: if sigma's density is above 0 at sigma 0, as
    with uniform timesteps, only the clamp keeps the mean finite. With logit-normal timesteps it is 2.92 at shift 3.
    """

    normalised: ClassVar[bool] = False

    kind: Annotated[Literal["sigma_sqrt"], WRITTEN] = Field("sigma_sqrt", description="Strongly favours low noise.")


class CosmapWeightingConfig(WeightingSection):
    """2 / (pi (1 - 2 s + 2 s^2)), with mean 1. With uniform timesteps, it equals cosmap timesteps without weighting."""

    kind: Annotated[Literal["cosmap"], WRITTEN] = Field(
        "cosmap", description="Weights sigma as a cosine schedule samples it."
    )


WeightingConfig = Annotated[
    NoWeightingConfig | MinSnrConfig | SigmaSqrtConfig | CosmapWeightingConfig, Field(discriminator="kind")
]


class MseConfig(LossSection):
    """Mean of (v - target)^2. The optimum is the mean velocity, which the flow needs."""

    estimates_mean: ClassVar[bool] = True

    kind: Annotated[Literal["mse"], WRITTEN] = Field("mse", description="Squared error.")


class AbsoluteConfig(LossSection):
    """Mean of |v - target|. The optimum is the median velocity, value by value: rare kinds of image may be lost."""

    kind: Annotated[Literal["absolute"], WRITTEN] = Field(
        "absolute", description="Absolute error: outliers count no more than others, and rare kinds of image vanish."
    )


class HuberConfig(LossSection):
    """Mean of d^2 / 2 where |d| < delta, else of delta (|d| - delta / 2), with d = v - target (Huber 1964). The optimum
    is not the mean velocity that the flow needs: at delta 1, a kind of 20 % of the images is drawn 9 % of the time.
    """

    kind: Annotated[Literal["huber"], WRITTEN] = Field(
        "huber",
        description="Squared error near the target, absolute error far from it; rare kinds of image are drawn less "
        "often than they occur in the data.",
    )
    delta: Annotated[float, WRITTEN] = Field(
        1.0,
        gt=0,
        description="Error at which the loss becomes linear; data and noise have a standard deviation of about 1.",
    )


class PseudoHuberConfig(LossSection):
    """Mean of delta^2 (sqrt(1 + (d / delta)^2) - 1) with d = v - target, smooth everywhere: d^2 / 2 for small d, delta
    |d| for large. The optimum lies between the mean velocity (large delta) and the median (small delta).
    """

    kind: Annotated[Literal["pseudo_huber"], WRITTEN] = Field(
        "pseudo_huber", description="Smooth form of Huber's loss, whose delta may change with sigma or over the steps."
    )
    delta: Annotated[float, WRITTEN] = Field(
        1.0, gt=0, description="Error at which the loss turns from a square to a line; with `last_delta`, the first."
    )
    last_delta: Annotated[float | None, WRITTEN] = Field(
        None,
        gt=0,
        description="Delta at sigma 1 or at the end of the run, reached by equal factors; null keeps `delta`. A small "
        "delta also makes the loss small, and so weighs those samples less.",
    )
    over: Annotated[Literal["sigma", "steps"], WRITTEN] = Field(
        "sigma",
        description="`sigma`: from `delta` at sigma 0 to `last_delta` at sigma 1; `steps`: from the first step to the "
        "last.",
    )

    @property
    def depends_on_length(self) -> bool:
        return self.last_delta is not None and self.over == "steps"


LossConfig = Annotated[MseConfig | AbsoluteConfig | HuberConfig | PseudoHuberConfig, Field(discriminator="kind")]


class FlowConfig(Section):
    """The rectified-flow objective. sigma 1 is noise."""

    timesteps: Annotated[TimestepsConfig, _STATED] = Field(
        default_factory=LogitNormalConfig, description="Distribution of sigma."
    )
    shift: Annotated[Literal["model", "resolution"] | Annotated[float, Field(gt=0)], RESOLVED] = Field(
        "model",
        description="Maps sigma to shift*s / (1 + (shift-1)*s) after sampling; `model` is the base scheduler's shift "
        "(3.0 for SD3), 1.0 leaves sigma unchanged; `resolution` is the base's shift times sqrt(pixels / 1024^2), so "
        "that smaller images get less noise.",
    )
    min_sigma: Annotated[float, WRITTEN] = Field(
        0.0, ge=0, lt=1, description="Smallest sigma in training, after the shift."
    )
    max_sigma: Annotated[float, WRITTEN] = Field(
        1.0,
        gt=0,
        le=1,
        description="Largest sigma in training. The density is truncated to these bounds and rescaled, not clamped.",
    )
    weighting: Annotated[WeightingConfig, _STATED] = Field(
        default_factory=NoWeightingConfig, description="Loss weight as a function of sigma."
    )
    loss: Annotated[LossConfig, _STATED] = Field(default_factory=MseConfig, description="Distance between velocities.")
    noise_offset: Annotated[float, _STATED] = Field(
        0.0,
        ge=0,
        le=1,
        description="Strength of a random constant added to the noise of each image and channel, which teaches overall "
        "brightness; 0 turns it off, 0.05 is strong. sd3tune also draws with it; other tools do not, and then reach 15 "
        "% (0.05) to 60 % (0.01) of the spread of brightness at 1024 px.",
    )
    input_perturbation: Annotated[float, RESOLVED] = Field(
        0.0,
        ge=0,
        le=1,
        description="Strength of more noise that is added to the noise of the input, but not of the target (Ning et "
        "al. 2023), because a model that samples sees its own errors; 0 turns it off, 0.1 is theirs.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> FlowConfig:
        if {one.kind for one in self.timesteps.densities} == {self.weighting.kind} == {"cosmap"}:
            raise ValueError("cosmap timesteps with cosmap weighting apply the same weight twice; change one of them")
        if self.min_sigma >= self.max_sigma:
            raise ValueError(f"min_sigma {self.min_sigma:g} must be below max_sigma {self.max_sigma:g}")
        return self
