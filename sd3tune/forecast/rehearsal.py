"""What a run computes, without weights and without numbers, to see what it takes.

These are the run's own functions, called on the meta device: there is no formula that could fall behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config import Config
from sd3tune.data.buckets import Size
from sd3tune.encode.captions import CLIP_LENGTH
from sd3tune.forecast.footprint import Footprint, Saved, bytes_of, peak_of, tensors_of
from sd3tune.forecast.thinning import Parts, Thinned, thin_out
from sd3tune.methods import Method
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.compute.hoist import Modulation, hoist, row_bytes
from sd3tune.model.load.components import empty_transformer, load_vae, text_encoder_shape
from sd3tune.model.load.latents import decode
from sd3tune.model.load.quantized import load_transformer_in, quantize, statistics
from sd3tune.run.setup import hoists, make_trainable
from sd3tune.training.ahead import window_length, with_modulations
from sd3tune.training.batches import Batch, Batches
from sd3tune.training.objective import make_objective
from sd3tune.training.optim import FlatMaster, LossScale
from sd3tune.training.optimizers import make_optimizer
from sd3tune.training.step import TrainState, predict_velocity, train_step, update

META = torch.device("meta")
_SHIFT = 3.0  # any will do: it changes the sigmas, which are no numbers here
_PROBED = 1 << 16
"""Values that an optimizer is tried on; what it takes is in proportion."""
_LEFT_OUT = "left out"
"""The trained parameters of the blocks that are not there, as one."""


@dataclass(frozen=True)
class Use:
    """Bytes of one phase: what lies in memory throughout, and what comes on top of it at the worst moment."""

    resident: int
    working: int

    @property
    def peak(self) -> int:
        return self.resident + self.working


@dataclass(frozen=True)
class Training:
    """What a step takes: bytes, but for the counts."""

    parameters: int
    """Count of the base's parameters."""
    trained: int
    """Count of what is trained: the adapter's, or with the method `full` the base's own."""
    frozen: int
    """The base in the dtype that is computed in; with `full`, what of it nobody trains."""
    compute: int
    """What is trained, in the dtype that is computed in; 0 where that is fp32, as the master serves."""
    master: int
    gradient: int
    """The fp32 sum of gradients."""
    optimizer: int
    average: int
    """The EMA."""
    ahead: int
    """The adaLN modulations of a window of steps, where they are computed ahead."""
    saved: int
    """What the forward pass leaves for the backward pass; it is part of `working`."""
    working: int
    """All else that is alive at the worst moment of a step."""
    flops: int
    """Of an optimizer step: all its forward and backward passes."""
    preview: int | None
    """What drawing a preview adds to what is resident; None without prompts."""

    @property
    def resident(self) -> int:
        return self.frozen + self.compute + self.master + self.gradient + self.optimizer + self.average + self.ahead

    @property
    def peak(self) -> int:
        return self.resident + self.working


class EmptyBatches:
    """Stands in for `Batches`: the shapes of its batches, all of images of one size, on the meta device.

    Captions have the longest T5 length that is trained at.
    Where a source has a prior, every instance has one beside it, which is the most there can be.
    """

    def __init__(self, config: Config, base: Base, encoders: tuple[str, ...], size: Size, dtype: torch.dtype) -> None:
        priors = [prior for source in config.data.sources if (prior := source.prior) and prior.weight > 0]
        kept = bool(config.data.own_predictions)
        self.with_prior, self.instances = bool(priors), config.train.batch_size
        self.rows = self.instances * (2 if priors else 1)
        self.kept = slice(self.instances if kept else self.rows, self.rows)
        self.size, self.dtype, self.channels = size, dtype, base.config("vae")["latent_channels"]
        self.batch_size, self.accumulation = config.train.batch_size, config.train.gradient_accumulation
        self.names: Sequence[str] = ()
        self.modulation: Modulation | None = None
        self.shapes = {encoder: _entry_shapes(base, encoder, config) for encoder in encoders}

    def fetch(self, step: int, micro: int) -> Batch:
        return replace(self.of(self.rows, self.size), modulation=self.modulation)

    def seed_for(self, purpose: str, step: int, micro: int) -> int:
        return 0

    def conditions(self, step: int, micro: int) -> tuple[Tensor, Mapping[str, Mapping[str, Tensor]]]:
        batch = self.fetch(step, micro)
        return batch.sigma, batch.embeddings

    def of(self, rows: int, size: Size) -> Batch:
        """A batch of `rows` images of that size, (height, width) in pixels."""
        shape = (rows, self.channels, size[0] // 8, size[1] // 8)
        return Batch(
            latents=torch.empty(shape, device=META),
            noise=torch.empty(shape, device=META),
            sigma=torch.empty(rows, device=META),
            embeddings={encoder: self._entries(rows, shapes) for encoder, shapes in self.shapes.items()},
            weights=torch.empty(rows, device=META),
            names=[""] * rows,
            instances=self.instances,
            kept=self.kept,
        )

    def _entries(self, rows: int, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        return {name: torch.empty(rows, *shape, dtype=self.dtype, device=META) for name, shape in shapes.items()}


def _entry_shapes(base: Base, encoder: str, config: Config) -> dict[str, tuple[int, ...]]:
    of = base.config(ENCODER_PARTS[encoder][1])
    if encoder == "t5":
        return {"hidden": (max(config.model.t5_lengths), of["d_model"])}
    return {"hidden": (CLIP_LENGTH, of["hidden_size"]), "pooled": (of["projection_dim"],)}


class _NoOptimizer(torch.optim.Optimizer):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """torch's fused ones refuse the meta device."""


def rehearse_training(
    config: Config, base: Base, method: Method, size: Size, dtype: torch.dtype, like: Training | None = None
) -> Training:
    """One optimizer step and, where there are prompts, one preview; `size` is that of the images, (height, width).

    The preview of `like`, if that is given, is the same and not rehearsed again.
    """
    whole = empty_transformer(base)
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    transformer = _load(config, base, method, dtype, whole)
    empty = EmptyBatches(config, base, method.cached_encoders, size, dtype)
    batches = with_modulations(cast(Batches, empty), transformer, method)
    with Footprint() as window:  # before the step, as it is of many
        ahead = list(batches.fetch(0, 0).modulation or ())
    modulation = row_bytes(transformer)
    thin = thin_out(transformer, method, config.train.checkpointed_blocks)
    empty.modulation = thin.left(ahead) if ahead else None
    checkpointing = {"checkpointed_blocks": thin.first(config.train.checkpointed_blocks)}
    thinned = config.model_copy(update={"train": config.train.model_copy(update=checkpointing)})
    trained = make_trainable(thinned, method, transformer)
    left_out = thin.rest(lambda block: sum(of.numel() for of in block.parameters() if of.requires_grad))
    if left_out:
        trained[_LEFT_OUT] = nn.Parameter(torch.empty(left_out, device=META))
    master = FlatMaster(trained, dtype)
    values = master.master.numel()
    state = TrainState(
        step=0,
        master=master,
        optimizer=_NoOptimizer([master.master], {"lr": 0.0}),  # for the real one see `try_optimizer`
        ema=master.master.detach().clone() if config.ema is not None else None,
        loss_scale=LossScale(META, enabled=dtype is torch.float16),
    )
    frozen = _frozen(transformer)
    saved = Saved([*tensors_of(transformer), *frozen, *ahead, master.master])
    with saved.watching():
        step = _rehearse_step(config, state, thin, method, empty, saved)
    optimizer = try_optimizer(config)
    if like is not None:
        preview = like.preview
    elif config.preview.prompts:
        preview = _rehearse_preview(config, base, method, thin, state, empty, modulation)
    else:
        preview = None
    return Training(
        parameters=parameters,
        trained=values,
        frozen=bytes_of(frozen) + thin.rest(lambda block: bytes_of(_frozen(block))),
        compute=0 if dtype is torch.float32 else bytes_of([master.compute]),
        master=bytes_of([master.master]),
        gradient=bytes_of([master.gradient]),
        optimizer=optimizer.resident * values // _PROBED,
        ahead=bytes_of(ahead),
        average=0 if state.ema is None else bytes_of([state.ema]),
        saved=step.saved,
        working=max(step.peak, optimizer.working * values // _PROBED),
        flops=(step.flops + window.flops // window_length(batches)) * config.train.gradient_accumulation,
        preview=preview,
    )


def _load(
    config: Config, base: Base, method: Method, dtype: torch.dtype, whole: SD3Transformer2DModel
) -> SD3Transformer2DModel:
    prepare = hoist if hoists(config, method.select(whole)) else None
    return load_transformer_in(config.model.quantize, base, dtype, META, prepare)


def _frozen(model: nn.Module) -> list[Tensor]:
    return [*(tensor for tensor in tensors_of(model) if not tensor.requires_grad), *statistics(model)]


def _rehearse_step(
    config: Config, state: TrainState, thin: Thinned, method: Method, batches: EmptyBatches, saved: Saved
) -> Parts:
    """One micro-step and the update: further ones take the same memory."""
    once = config.model_copy(update={"train": config.train.model_copy(update={"gradient_accumulation": 1, "steps": 1})})
    objective = make_objective(config.flow, _SHIFT)
    master = state.master
    collect, left_out = master.collect_gradients, master.parameters[-1] if _LEFT_OUT in master.shapes else None

    def step(parts: Parts) -> None:
        def collecting() -> None:  # makes the gradients of what was left out, which were counted in its blocks' parts
            parts.mark(freed=0 if left_out is None else left_out.nbytes)
            collect()

        master.collect_gradients = collecting  # type: ignore[method-assign]
        train_step(state, thin.transformer, method, cast(Batches, batches), objective, once, _alone)

    return thin.measured(step, saved)


def _alone(gradient: Tensor) -> Tensor:
    return gradient


def try_optimizer(config: Config) -> Use:
    """What the optimizer keeps, and takes on top while it updates, for each `_PROBED` values; tried on the CPU."""
    master = FlatMaster({"probed": nn.Parameter(torch.zeros(_PROBED))}, torch.float32)
    optimizer = make_optimizer(config.optimizer, master.master)
    state = TrainState(0, master, optimizer, None, LossScale(master.master.device, enabled=False))
    for _ in range(2):  # the first step makes the state
        master.gradient.fill_(1.0)
        footprint = peak_of(lambda: update(state, config, config.optimizer.lr, _alone))
    kept = [value for value in optimizer.state[master.master].values() if isinstance(value, Tensor) and value.ndim]
    return Use(bytes_of(kept), footprint.peak)


def _rehearse_preview(
    config: Config,
    base: Base,
    method: Method,
    thin: Thinned,
    state: TrainState,
    batches: EmptyBatches,
    row_bytes: int,
) -> int:
    """A denoising step, then decoding by the VAE: the most that either adds. `row_bytes` is of the whole model."""
    transformer = thin.transformer
    weights = state.master.named(state.master.master)
    weights.pop(_LEFT_OUT, None)

    def exported_bytes(lacking: str) -> int:
        left = {name: value for name, value in weights.items() if not lacking or not name.startswith(lacking)}
        with torch.no_grad(), Footprint() as footprint, method.as_exported(transformer, left):
            return footprint.now

    left_out = thin.rest_without(exported_bytes)
    rows = 2 if config.preview.guidance > 1 else 1
    side = config.data.resolution

    def drawing(compute: Callable[[], object]) -> int:
        def draw(parts: Parts) -> None:
            with torch.no_grad(), method.as_exported(transformer, weights):
                parts.mark(freed=-left_out)
                compute()

        return thin.measured(draw).peak

    denoising = drawing(lambda: predict_velocity(transformer, method, batches.of(rows, (side, side))))
    denoising += rows * config.preview.steps * row_bytes
    vae = load_vae(base, vae_dtype(dtype_of(transformer)), META)
    latents = batches.of(1, (side, side)).latents
    return max(denoising, bytes_of(tensors_of(vae)) + drawing(lambda: decode(vae, latents)))


def rehearse_text_encoder(base: Base, encoder: str, dtype: torch.dtype, tokens: int, form: str = "none") -> Use:
    """One text through one encoder (`clip_l`, `clip_g` or `t5`), held in that form."""
    model = text_encoder_shape(base, encoder, dtype)
    if form != "none":
        quantize(model, model, form, META)
    ids = torch.zeros(1, CLIP_LENGTH if encoder != "t5" else tokens, dtype=torch.long, device=META)
    with torch.no_grad():
        footprint = peak_of(lambda: model(ids, output_hidden_states=encoder != "t5"))
    return Use(bytes_of([*tensors_of(model), *statistics(model)]), footprint.peak)


def rehearse_vae(base: Base, size: Size, dtype: torch.dtype) -> Use:
    """One image of that size into latents."""
    vae = load_vae(base, vae_dtype(dtype), META)
    with torch.no_grad():
        footprint = peak_of(lambda: vae.encode(torch.empty(1, 3, *size, dtype=vae.dtype, device=META)))
    return Use(bytes_of(tensors_of(vae)), footprint.peak)


def rehearse_drawing(config: Config, base: Base, method: Method, size: Size, dtype: torch.dtype) -> Use:
    """A class image drawn by the base, with guidance: transformer and VAE are in memory together."""
    transformer = _load(config, base, method, dtype, empty_transformer(base))
    vae = load_vae(base, vae_dtype(dtype), META)
    batch = EmptyBatches(config, base, method.cached_encoders, size, dtype).of(2, size)
    resident = bytes_of([*tensors_of(transformer), *statistics(transformer), *tensors_of(vae)])
    thin = thin_out(transformer, method, None)
    with torch.no_grad():
        denoising = thin.measured(lambda _: predict_velocity(transformer, method, batch))
        decoding = peak_of(lambda: decode(vae, batch.latents[:1]))
    return Use(resident, max(denoising.peak, decoding.peak))


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """The VAE overflows in fp16, so it computes in fp32 then."""
    return torch.float32 if dtype is torch.float16 else dtype


def dtype_of(transformer: nn.Module) -> torch.dtype:
    return next(transformer.parameters()).dtype
