"""The checks of `benchmarks.gpu.check`: each yields findings."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.cells import Cell, Shapes
from benchmarks.gpu.check import Finding
from benchmarks.gpu.device import Device, outcome_of
from benchmarks.gpu.models import config_of, model_of, random_on_device
from benchmarks.trainer import make_trainer
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.data.sampler import generator
from sd3tune.forecast.forecast import MARGIN
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.methods import LoraMethod
from sd3tune.model.base.resolve import shape_of_base
from sd3tune.model.compute.checkpointing import checkpoint_blocks
from sd3tune.model.compute.compiled import compile_blocks
from sd3tune.model.compute.fast import use_fast_path
from sd3tune.model.compute.swap import BlockSwap
from sd3tune.model.load.components import transformer_config
from sd3tune.model.load.quantized import FORMS, quantize, weights_of
from sd3tune.model.lora.layers import Layer, inject_lora
from sd3tune.model.lora.targets import select_modules
from sd3tune.training.loop import View

BLOCKS = 4
"""Blocks of the compared model, which otherwise has the full width; half of them have a second attention."""
STEADY = (3, 9)
"""Steps after which the host may not wait any more, and may again."""
EXACT = 1e-5
"""Largest relative error of a path in fp32."""
AS_PRECISE = 1.5
"""Largest error of a path in bf16, as a multiple of the plain path's error."""

Check = Callable[[Device, Shapes, Path], Iterator[Finding]]
Prepare = Callable[[SD3Transformer2DModel], object]

PATHS: Mapping[str, Sequence[Prepare]] = {
    "block": [lambda model: checkpoint_blocks(model, "block", None)],
    "selective": [lambda model: checkpoint_blocks(model, "selective", None)],
    "fast": [use_fast_path],
    "compiled": [compile_blocks],
    "compiled, block": [lambda model: checkpoint_blocks(model, "block", None), compile_blocks],
    "fast, block": [lambda model: checkpoint_blocks(model, "block", None), use_fast_path],
    "fast, selective": [lambda model: checkpoint_blocks(model, "selective", None), use_fast_path],
}
KINDS: Mapping[SDPBackend, Callable[[], bool]] = {
    SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
    SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
}
"""Kinds of attention -> whether torch may use them here."""


def steady_steps(device: Device, shapes: Shapes, out: Path) -> Iterator[Finding]:
    """Train `tiny`; torch raises an error, with the line, where the host waits for the GPU."""
    run = out / "steady"
    shutil.rmtree(run, ignore_errors=True)
    steps = STEADY[1] + 2
    settings = (
        f"output_dir={run.absolute()}",
        f"train.steps={steps}",
        f"train.log_every={steps}",
        "model.dtype=bf16",
        f"checkpoint.every={steps}",
        "preview.steps=2",
    )

    def watch(view: View) -> None:
        if device.torch.type == "cuda" and view.step in STEADY:
            torch.cuda.set_sync_debug_mode("error" if view.step == STEADY[0] else "default")

    try:
        run_training(load_config(_TINY, settings).config, callbacks=[watch])
    finally:
        if device.torch.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    yield Finding("steady steps", "host waits in six steps of tiny", 0.0, 0.0)


def paths(device: Device, shapes: Shapes, out: Path) -> Iterator[Finding]:
    """Compare outputs and gradients with the plain path in fp32, and with its error in bf16."""
    plain = _adapted(shapes, device.torch)
    exact = _computed(plain)
    for dtype in (torch.float32, torch.bfloat16):
        title = str(dtype).removeprefix("torch.")
        limit = (EXACT, EXACT)
        if dtype is torch.bfloat16:
            errors = _errors(_computed(_as(plain, dtype)), exact)
            limit = (AS_PRECISE * errors[0], AS_PRECISE * errors[1])
            yield from _compared("paths", f"plain, {title}", errors, (None, None))
        for name, preparations in PATHS.items():
            if compile_blocks in preparations and device.torch.type == "cpu":
                continue  # it takes minutes of a C++ compiler
            model = _as(plain, dtype)
            for prepare in preparations:
                prepare(model)
            yield from _compared("paths", f"{name}, {title}", _errors(_computed(model), exact), limit)


def quantised_bases(device: Device, shapes: Shapes, out: Path) -> Iterator[Finding]:
    """Compare a quantised base with the plain path on its dequantised weights."""
    for form in FORMS:
        plain = _adapted(shapes, device.torch, adapted=False)
        quantised = nn.Module.to(copy.deepcopy(plain).cpu(), torch.bfloat16)
        quantize(quantised, quantised.transformer_blocks, form, device.torch)
        nn.Module.to(quantised, device.torch)
        layers = dict(quantised.named_modules())
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = weights_of(layers[name], torch.float32).float()
        exact = _computed(_with_factors(plain))
        limit = _errors(_computed(_as(plain, torch.bfloat16)), exact)
        bound = (AS_PRECISE * limit[0], AS_PRECISE * limit[1])
        model = _with_factors(quantised)
        yield from _compared("quantised bases", f"{form}, plain", _errors(_computed(model), exact), bound)
        use_fast_path(model)
        yield from _compared("quantised bases", f"{form}, fast", _errors(_computed(model), exact), bound)


def swapped_blocks(device: Device, shapes: Shapes, out: Path) -> Iterator[Finding]:
    """Compare swapped blocks with the plain path in fp32: only the place of their weights differs."""
    plain = _adapted(shapes, device.torch, adapted=False)
    model = copy.deepcopy(plain)
    exact = _computed(_with_factors(plain))
    swap = BlockSwap(BLOCKS, BLOCKS, device.torch)
    for number, block in enumerate(model.transformer_blocks):
        swap.store(number, block)
    swap.install(model)
    model = _with_factors(model)
    for turn in ("first", "second"):  # the second begins with the buffers as the first left them
        yield from _compared("swapped blocks", f"{turn} step", _errors(_computed(model), exact), (EXACT, EXACT))


def attention(device: Device, shapes: Shapes, out: Path) -> Iterator[Finding]:
    """Compare the kinds of attention in bf16 with the product written out, in fp32."""
    heads, tokens, width = shapes.attention
    source = generator(0, device=device.torch)
    drawn = [torch.randn(1, heads, tokens, width, generator=source, device=device.torch) for _ in range(4)]

    def computed(kind: SDPBackend, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        query, key, value = leaves = [one.to(dtype, copy=True).requires_grad_(True) for one in drawn[:3]]
        with sdpa_kernel(kind):
            found = F.scaled_dot_product_attention(query, key, value)
        found.backward(drawn[3].to(dtype))
        return found.detach(), torch.cat([one.grad.flatten() for one in leaves if one.grad is not None])

    exact = computed(SDPBackend.MATH, torch.float32)
    limit = _errors(computed(SDPBackend.MATH, torch.bfloat16), exact)
    for kind, enabled in KINDS.items():
        name = kind.name.lower()
        if not enabled():
            yield Finding("attention", name, None, None, "switched off")
            continue
        try:
            errors = _errors(computed(kind, torch.bfloat16), exact)
        except RuntimeError as error:
            yield Finding("attention", name, None, None, f"not available: {outcome_of(error)[:80]}")
            continue
        bound = (AS_PRECISE * max(limit[0], 2**-8), AS_PRECISE * max(limit[1], 2**-8))
        yield from _compared("attention", name, errors, bound)


def memory(device: Device, shapes: Shapes, out: Path) -> Iterator[Finding]:
    """Compare a full-size model's memory with its plan."""
    cell = Cell("sd35-medium", shapes.large, 1)
    config = config_of(cell, shapes)
    size = (cell.pixels, cell.pixels)
    planned = rehearse_training(config, shape_of_base(config.model), LoraMethod(config), size, torch.bfloat16).peak
    folder = out / "memory"
    shutil.rmtree(folder, ignore_errors=True)
    with device.watching_memory():
        trainer = make_trainer(config, model_of(cell, shapes, device.torch), folder, device.torch)
        try:
            trainer.step()
            device.restart_peak()
            for _ in range(3):
                trainer.step()
            allocated = device.peak_bytes()
        finally:
            trainer.batches.close()
    on_gpu = device.torch.type == "cuda"
    yield Finding("memory", "allocated against plan", abs(allocated / planned - 1), 0.03 if on_gpu else None)
    if on_gpu:
        reserved = torch.cuda.max_memory_reserved(device.torch)
        yield Finding("memory", "reserved beyond plan", reserved / planned - 1, MARGIN)


CHECKS: Mapping[str, Check] = {
    "steady steps": steady_steps,
    "paths": paths,
    "quantised bases": quantised_bases,
    "swapped blocks": swapped_blocks,
    "attention": attention,
    "memory": memory,
}
_TINY = Path(__file__).parents[2] / "configs" / "tiny_smoke.yaml"


def _adapted(shapes: Shapes, device: torch.device, *, adapted: bool = True) -> SD3Transformer2DModel:
    """Return a model of full width with few blocks and random weights, fp32, with LoRA factors."""
    base = shape_of_base(config_of(Cell("sd35-medium", shapes.large, 1), shapes).model)
    blocks = {"num_layers": BLOCKS, "dual_attention_layers": tuple(range(BLOCKS // 2))}
    with torch.device("meta"):
        empty = SD3Transformer2DModel.from_config({**transformer_config(base), **blocks})
    model = random_on_device(empty, torch.float32, device)
    return _with_factors(model) if adapted else model


def _with_factors(model: SD3Transformer2DModel) -> SD3Transformer2DModel:
    layers = {name: Layer(16, 16.0) for name in select_modules(model, "attention+mlp", None)}
    for name, parameter in inject_lora(model, layers, lambda name: generator(0, name)).items():
        parameter.data = parameter.data.to(model.device)
        if name.endswith(".lora_B"):
            parameter.data.normal_(std=0.02, generator=generator(1, name, device=model.device))
    return model


def _as(model: SD3Transformer2DModel, dtype: torch.dtype) -> SD3Transformer2DModel:
    return nn.Module.to(copy.deepcopy(model), dtype)


def _computed(model: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
    """Return the velocity of fixed inputs, and the gradients of its product with something fixed."""
    device, config, source = model.device, model.config, generator(2)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).to(device, model.dtype)

    inputs = {
        "hidden_states": draw(2, config.in_channels, 32, 32),
        "timestep": torch.tensor([250.0, 900.0], device=device),
        "encoder_hidden_states": draw(2, 77, config.joint_attention_dim),
        "pooled_projections": draw(2, config.pooled_projection_dim),
    }
    velocity = model(**inputs, return_dict=False)[0]
    model.zero_grad()
    (velocity.float() * draw(*velocity.shape).float()).sum().backward()
    gradients = [of.grad.float().flatten() for of in model.parameters() if of.grad is not None]
    return velocity.detach().float(), torch.cat(gradients)


def _errors(found: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the relative errors of outputs and gradients."""
    one, other = (float((of.float() - to).norm() / to.norm()) for of, to in zip(found, exact, strict=True))
    return one, other


def _compared(
    check: str, what: str, errors: tuple[float, float], limits: tuple[float | None, float | None]
) -> Iterator[Finding]:
    for part, error, limit in zip(("output", "gradient"), errors, limits, strict=True):
        yield Finding(check, f"{what}: error of the {part}", error, limit)
