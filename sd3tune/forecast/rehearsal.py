"""Rehearsals of a run's phases on the meta device, to measure memory and operations.

They call the run's own functions, so there are no formulas to keep up to date.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config import Config
from sd3tune.config.sections.masks import any_keeps_base
from sd3tune.data.buckets import Size
from sd3tune.encode.captions import CLIP_LENGTH
from sd3tune.forecast.footprint import Footprint, SavedTensors, bytes_of, peak_of, tensors_of
from sd3tune.forecast.optimizer_memory import MemoryUse, matrix_state, rehearse_optimizer
from sd3tune.forecast.thinning import Account, Thinned, thin_out
from sd3tune.methods import Method
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.compute.hoist import Modulation, hoist, row_bytes
from sd3tune.model.compute.swap import bytes_saved
from sd3tune.model.load.components import empty_transformer, load_vae, text_encoder_shape, vae_dtype
from sd3tune.model.load.latents import decode
from sd3tune.model.load.quantized import load_transformer_in, quantize, statistics
from sd3tune.model.load.text import TOKENS
from sd3tune.run.setup import hoists, make_trainable
from sd3tune.training.ahead import window_length, with_modulations
from sd3tune.training.batches import Batch
from sd3tune.training.flat_master import FlatMaster, LossScale
from sd3tune.training.fused_backward import FusedBackward
from sd3tune.training.objective import make_objective
from sd3tune.training.step import TrainState, predict_velocity, train_step

META = torch.device("meta")
_SHIFT = 3.0  # arbitrary: it only changes the values of sigmas
_OMITTED = "left out"
"""Name of one parameter that stands for all trained parameters of the omitted blocks."""


@dataclass(frozen=True)
class Training:
    """Cost of training: bytes, except for the counts and `flops`."""

    parameters: int
    """Number of the base's parameters."""
    trained: int
    """Number of trained parameters."""
    frozen: int
    """The base's frozen tensors on the device, in the compute dtype or quantized."""
    encoders: int
    """The frozen tensors of trained text encoders."""
    compute: int
    """The trained parameters in the compute dtype; 0 for fp32, which computes with the master."""
    master: int
    gradient: int
    """The fp32 gradient accumulator."""
    optimizer: int
    average: int
    """The EMA."""
    ahead: int
    """The adaLN modulations of a window of steps; 0 unless computed ahead."""
    saved: int
    """Tensors saved for the backward pass; included in `working`."""
    working: int
    """All other memory at the peak of a step."""
    flops: int
    """Operations of an optimizer step: all forward and backward passes."""
    preview: int | None
    """Memory of drawing a preview or a picture of `eval`, on top of `resident`; None without either."""
    gathered: int = 0
    """Blocks that are gathered from the processes that divide them."""

    @property
    def resident(self) -> int:
        models = self.frozen + self.encoders + self.gathered
        return models + self.compute + self.master + self.gradient + self.optimizer + self.average + self.ahead

    @property
    def peak(self) -> int:
        return self.resident + self.working


class MetaBatches:
    """A source of batches on the meta device, with images of a single size.

    Captions have the longest trained T5 length. If a source has a prior, every instance has a prior sample, and if the
    base's prediction is a target outside masks, every instance has a mask: the worst case.
    """

    def __init__(self, config: Config, base: Base, method: Method, size: Size, dtype: torch.dtype) -> None:
        priors = [prior for source in config.data.sources if (prior := source.prior) and prior.weight > 0]
        kept = bool(config.data.own_predictions)
        self.with_prior, self.instances = bool(priors), config.train.batch_size
        self.rows = self.instances * (2 if priors else 1)
        self.kept = slice(self.instances if kept else self.rows, self.rows)
        self.keeps_base = any_keeps_base(config.data.sources)
        self.size, self.dtype, self.channels = size, dtype, base.config("vae")["latent_channels"]
        self.batch_size, self.accumulation = config.train.batch_size, config.train.gradient_accumulation
        self.modulation: Modulation | None = None
        self.shapes = {encoder: _entry_shapes(base, encoder, config) for encoder in method.cached_encoders}
        self.trained = method.trained_encoders

    def fetch(self, step: int, micro: int) -> Batch:
        return replace(self.batch_of(self.rows, self.size), modulation=self.modulation)

    def seed_for(self, purpose: str, step: int, micro: int) -> int:
        return 0

    def names(self, step: int) -> Sequence[str]:
        return ()

    def concepts(self, step: int) -> Sequence[str]:
        return ()

    def conditions(self, step: int, micro: int) -> tuple[Tensor, Mapping[str, Mapping[str, Tensor]]]:
        batch = self.fetch(step, micro)
        return batch.sigma, batch.embeddings

    def batch_of(self, rows: int, size: Size) -> Batch:
        """Return a batch of `rows` images of `size`, (height, width) in pixels."""
        shape = (rows, self.channels, size[0] // 8, size[1] // 8)
        return Batch(
            latents=torch.empty(shape, device=META),
            noise=torch.empty(shape, device=META),
            sigma=torch.empty(rows, device=META),
            embeddings={encoder: self._entries(encoder, rows) for encoder in self.shapes},
            weights=torch.empty(rows, device=META),
            names=[""] * rows,
            instances=self.instances,
            kept=self.kept,
            from_base=torch.empty(rows, *shape[2:], device=META) if self.keeps_base else None,
        )

    def _entries(self, encoder: str, rows: int) -> dict[str, Tensor]:
        shapes = self.shapes[encoder].items()
        made = {name: torch.empty(rows, *shape, dtype=self.dtype, device=META) for name, shape in shapes}
        texts = torch.arange(1, 1 + rows)[:, None].expand(rows, CLIP_LENGTH)  # one for each image: the worst case
        return {**made, TOKENS: texts} if encoder in self.trained else made


def _entry_shapes(base: Base, encoder: str, config: Config) -> dict[str, tuple[int, ...]]:
    of = base.config(ENCODER_PARTS[encoder][1])
    if encoder == "t5":
        return {"hidden": (max(config.model.t5_lengths), of["d_model"])}
    return {"hidden": (CLIP_LENGTH, of["hidden_size"]), "pooled": (of["projection_dim"],)}


class _NoOptimizer(torch.optim.Optimizer):
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Do nothing: torch's fused optimizers refuse the meta device."""

    def update_slice(self, start: int, gradient: Tensor) -> None: ...

    def finish(self) -> None: ...


def rehearse_training(
    config: Config, base: Base, method: Method, size: Size, dtype: torch.dtype, like: Training | None = None
) -> Training:
    """Rehearse an optimizer step and, if pictures are drawn, a preview. `size` is the images' (height, width).

    With `like`, its preview is used instead of a new rehearsal.
    """
    whole = empty_transformer(base)
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    transformer = loaded_shape(config, base, method, dtype, whole)
    empty = MetaBatches(config, base, method, size, dtype)
    batches = with_modulations(empty, transformer, method)
    with Footprint() as window:  # measured apart from the step, as it covers several steps
        ahead = list(batches.fetch(0, 0).modulation or ())
    modulation = row_bytes(transformer)
    swapped = bytes_saved(transformer, config.train.swap_blocks or 0)
    thin = thin_out(transformer, method, config.train.checkpointed_blocks)
    empty.modulation = thin.remaining_modulation(ahead) if ahead else None
    checkpointing = {"checkpointed_blocks": thin.remaining_of_first(config.train.checkpointed_blocks)}
    thinned = config.model_copy(update={"train": config.train.model_copy(update=checkpointing)})
    trained = make_trainable(thinned, method, transformer)
    left_out = thin.omitted_sum(lambda block: sum(of.numel() for of in block.parameters() if of.requires_grad))
    if left_out:
        trained[_OMITTED] = nn.Parameter(torch.empty(left_out, device=META))
    rates = method.rates(trained)
    accumulates = not config.train.fused_backward
    master = FlatMaster(trained, dtype, accumulates, rates=rates, segments=method.segments)
    values = master.master.numel()
    idle = _NoOptimizer([master.master], {"lr": 0.0})  # see `rehearse_optimizer` for the real one
    state = TrainState(
        step=0,
        master=master,
        optimizer=idle,
        ema=master.master.detach().clone() if config.ema is not None else None,
        loss_scale=LossScale(META, enabled=dtype is torch.float16),
        fused=FusedBackward(master, idle, without=_OMITTED) if config.train.fused_backward else None,
    )
    frozen = _frozen(transformer)
    encoders = [tensor for model in method.companions() for tensor in _frozen(model)]
    saved = SavedTensors([*tensors_of(transformer), *frozen, *encoders, *ahead, master.master])
    with saved.watching():
        step = _rehearse_step(config, state, thin, method, empty, saved)
    most_values = state.fused.most_values if state.fused else None
    optimizer = rehearse_optimizer(config, values, most_values, matrix_state(config, master.shapes, thin, _OMITTED))
    preview = like.preview if like else None
    if like is None and (config.preview.prompts or config.eval is not None):
        preview = _rehearse_preview(config, base, method, thin, state, empty, modulation)
    return Training(
        parameters=parameters,
        trained=values,
        frozen=bytes_of(frozen) + thin.omitted_sum(lambda block: bytes_of(_frozen(block))) - swapped,
        encoders=bytes_of(encoders),
        compute=0 if dtype is torch.float32 else bytes_of([master.compute]),
        master=bytes_of([master.master, *([] if master.rates is None else [master.rates])]),
        gradient=bytes_of([master.gradient]),
        optimizer=optimizer.resident,
        ahead=bytes_of(ahead),
        average=0 if state.ema is None else bytes_of([state.ema]),
        saved=step.saved,
        working=max(step.peak, optimizer.working) if state.fused is None else step.peak + optimizer.working,
        flops=(step.flops + window.flops // window_length(batches)) * config.train.gradient_accumulation,
        preview=preview,
    )


def loaded_shape(
    config: Config, base: Base, method: Method, dtype: torch.dtype, whole: SD3Transformer2DModel
) -> SD3Transformer2DModel:
    """Return the transformer as a run loads it, on the meta device; `whole` is one that was not changed."""
    prepare = hoist if hoists(config, method.select(whole)) else None
    return load_transformer_in(config.model.quantize, base, dtype, META, prepare)


def _frozen(model: nn.Module) -> list[Tensor]:
    return [*(tensor for tensor in tensors_of(model) if not tensor.requires_grad), *statistics(model)]


def _rehearse_step(
    config: Config, state: TrainState, thin: Thinned, method: Method, batches: MetaBatches, saved: SavedTensors
) -> Account:
    """Rehearse one micro-step and the update; more micro-steps take the same memory."""
    once = config.model_copy(update={"train": config.train.model_copy(update={"gradient_accumulation": 1, "steps": 1})})
    objective = make_objective(config.flow, _SHIFT)
    master = state.master
    collect, left_out = master.collect_gradients, master.parameters[-1] if _OMITTED in master.shapes else None

    def step(parts: Account) -> None:
        def collecting() -> None:  # creates the omitted blocks' gradients, which are already counted
            parts.mark(freed=0 if left_out is None else left_out.nbytes)
            collect()

        master.collect_gradients = collecting  # type: ignore[method-assign]
        train_step(state, thin.transformer, method, batches, objective, once, lambda gradient: gradient)

    return thin.measured(step, saved)


def _rehearse_preview(
    config: Config,
    base: Base,
    method: Method,
    thin: Thinned,
    state: TrainState,
    batches: MetaBatches,
    row_bytes: int,
) -> int:
    """Return the larger working memory of a denoising step and of decoding.

    `row_bytes` is the size of a row of adaLN modulations of the whole model.
    """
    transformer = thin.transformer
    weights = state.master.views(state.master.master)
    weights.pop(_OMITTED, None)

    def exported_bytes(lacking: str) -> int:
        left = {name: value for name, value in weights.items() if not lacking or not name.startswith(lacking)}
        with torch.no_grad(), Footprint() as footprint, method.as_exported(transformer, left):
            return footprint.now

    left_out = thin.omitted_contribution(exported_bytes)
    rows = 2 if config.preview.guidance > 1 else 1
    side = config.data.side
    sides = [(side, side), *(picture.sides[::-1] for picture in config.preview.pictures if picture.sides)]
    size = max(sides, key=math.prod)

    def drawing(compute: Callable[[], object]) -> int:
        def draw(parts: Account) -> None:
            with torch.no_grad(), method.as_exported(transformer, weights):
                parts.mark(freed=-left_out)
                compute()

        return thin.measured(draw).peak

    denoising = drawing(lambda: predict_velocity(transformer, method, batches.batch_of(rows, size)))
    denoising += rows * config.preview.steps * row_bytes
    vae = load_vae(base, vae_dtype(next(transformer.parameters()).dtype), META)
    latents = batches.batch_of(1, size).latents
    return max(denoising, bytes_of(tensors_of(vae)) + drawing(lambda: decode(vae, latents)))


def rehearse_text_encoder(base: Base, encoder: str, dtype: torch.dtype, tokens: int, form: str = "none") -> MemoryUse:
    """Rehearse encoding a text with one encoder (`clip_l`, `clip_g` or `t5`), quantized to `form`."""
    model = text_encoder_shape(base, encoder, dtype)
    if form != "none":
        quantize(model, model, form, META)
    ids = torch.zeros(1, CLIP_LENGTH if encoder != "t5" else tokens, dtype=torch.long, device=META)
    with torch.no_grad():
        footprint = peak_of(lambda: model(ids, output_hidden_states=encoder != "t5"))
    return MemoryUse(bytes_of([*tensors_of(model), *statistics(model)]), footprint.peak)


def rehearse_vae(base: Base, size: Size, dtype: torch.dtype) -> MemoryUse:
    """Rehearse encoding an image of `size`, (height, width) in pixels."""
    vae = load_vae(base, vae_dtype(dtype), META)
    with torch.no_grad():
        footprint = peak_of(lambda: vae.encode(torch.empty(1, 3, *size, dtype=vae.dtype, device=META)))
    return MemoryUse(bytes_of(tensors_of(vae)), footprint.peak)


def rehearse_drawing(config: Config, base: Base, method: Method, size: Size, dtype: torch.dtype) -> MemoryUse:
    """Rehearse drawing a class image with guidance. Transformer and VAE are in memory together."""
    transformer = loaded_shape(config, base, method, dtype, empty_transformer(base))
    vae = load_vae(base, vae_dtype(dtype), META)
    batch = MetaBatches(config, base, method, size, dtype).batch_of(2, size)
    resident = bytes_of([*tensors_of(transformer), *statistics(transformer), *tensors_of(vae)])
    resident -= bytes_saved(transformer, config.train.swap_blocks or 0)
    thin = thin_out(transformer, method, None)
    with torch.no_grad():
        denoising = thin.measured(lambda _: predict_velocity(transformer, method, batch))
        decoding = peak_of(lambda: decode(vae, batch.latents[:1]))
    return MemoryUse(resident, max(denoising.peak, decoding.peak))
