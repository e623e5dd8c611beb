"""What `sd3tune plan` predicts is what real runs of the tiny base are seen to take."""

from __future__ import annotations

import gc
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from sd3tune.commands.cache import run_cache
from sd3tune.commands.plan import components, gigabytes, plan_lines, planned_dtype
from sd3tune.config import Config, dump_config, load_config, parse_config
from sd3tune.config.loader import load_text
from sd3tune.config.sections.optimizer import AdamW8bitConfig, AdamWConfig
from sd3tune.data.store import Store
from sd3tune.errors import ConfigError
from sd3tune.forecast.fitting import leaner_configurations
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.forecast.gpus import GPUS
from sd3tune.forecast.knobs import after, knobs
from sd3tune.forecast.rehearsal import Training, rehearse_training
from sd3tune.methods import METHODS, Method
from sd3tune.model.base.resolve import resolve_base, shape_of_base
from sd3tune.model.compute.hoist import hoist, hoisted
from sd3tune.model.load.components import empty_transformer, load_text_encoder, load_transformer, load_vae
from sd3tune.model.load.quantized import load_text_encoder_in, load_transformer_in, quantize, statistics
from sd3tune.run.knobs import training_knob
from sd3tune.run.places import store_folder
from sd3tune.run.setup import hoists, make_trainable
from sd3tune.run.state import make_state
from sd3tune.training.batches import Batch
from sd3tune.training.flat_master import FlatMaster
from sd3tune.training.optimizers import state_tensors
from sd3tune.training.step import TrainState, predict_velocity, update

ROOT = Path(__file__).parents[2]
FULL = "method={kind: full}"
BLOCK = "train.gradient_checkpointing=block"
TEXT = {"clip_l": (77, 16, 16), "clip_g": (77, 32, 32)}
"""Tokens, width and pooled width of the tiny encoders; its T5 is 64 wide."""


def real_batch(rows: int, side: int, dtype: torch.dtype = torch.float32) -> Batch:
    embeddings = {
        name: {"hidden": torch.randn(rows, tokens, width).to(dtype), "pooled": torch.randn(rows, pooled).to(dtype)}
        for name, (tokens, width, pooled) in TEXT.items()
    }
    embeddings["t5"] = {"hidden": torch.randn(rows, 16, 64).to(dtype)}
    latents = torch.randn(rows, 16, side // 8, side // 8)
    return Batch(
        latents, torch.randn_like(latents), torch.rand(rows), embeddings, torch.ones(rows), [""] * rows, rows,
        slice(rows, rows),
    )  # fmt: skip


def real_model(config: Config, dtype: torch.dtype) -> tuple[SD3Transformer2DModel, Method, TrainState]:
    base = resolve_base("tiny")
    method = METHODS[config.method.kind](config, base)
    prepare = hoist if hoists(config, method.select(empty_transformer(base))) else None
    transformer = load_transformer_in(config.model.quantize, base, dtype, torch.device("cpu"), prepare)
    return (
        transformer,
        method,
        make_state(config, FlatMaster(make_trainable(config, method, transformer), dtype), dtype),
    )


def predicted(config: Config, dtype: torch.dtype = torch.float32) -> Training:
    base = shape_of_base(config.model)
    size = (config.data.resolution, config.data.resolution)
    return rehearse_training(config, base, METHODS[config.method.kind](config, base), size, dtype)


STEPS = [("none", 64), ("none", 160), ("block", 64), ("block", 160), ("selective", 160)]
QUANTISED = [("nf4", "none", 160), ("nf4", "block", 64), ("int8", "selective", 160)]


@pytest.mark.parametrize("kind", ["dora", "loha", "lokr"])
def test_every_change_that_is_listed_advised_or_tried_is_accepted(quick_config, tmp_path: Path, kind: str) -> None:
    """Not nf4 for LoHa and LoKr, whose layers need rows, nor swapped blocks for DoRA."""
    pytest.importorskip("bitsandbytes")
    method = f"method={{kind: {kind}}}"
    inputs = forecast_inputs(quick_config(tmp_path, method), torch.float32)
    listed = [typed for typed, _ in knobs(inputs)]
    assert "model.quantize=int8" in listed
    for typed in listed:
        quick_config(tmp_path, method, *typed.split())
    tried = [one.config for one in leaner_configurations(inputs)]
    assert "none" not in {tried[-1].model.quantize, tried[-1].train.gradient_checkpointing}
    for config in tried:
        assert load_text(dump_config(config), "tried.yaml").config == config
    swapped = ["train.swap_blocks=4"] * (kind != "dora")
    config = quick_config(tmp_path, method, BLOCK, *swapped)
    form, share = ("nf4", "a third") if kind == "dora" else ("int8", "half")
    advised = training_knob(config, METHODS[kind](config, resolve_base("tiny")), blocks=4)
    assert advised == f"set model.quantize={form}: {share} of the base's memory, for a little exactness"


@pytest.mark.parametrize(
    ("method", "checkpointing", "side"),
    [(method, *step) for method in (FULL, "method.rank=4") for step in STEPS]
    + [(f"model.quantize={form}", *step) for form, *step in QUANTISED]
    + [(f"method={{kind: {kind}, rank: 4}}", "none", 160) for kind in ("dora", "loha", "lokr")],
)
def test_saved_bytes_and_the_worst_moment_are_those_of_a_real_step(
    quick_config, tmp_path: Path, method: str, checkpointing: str, side: int
) -> None:
    config = quick_config(
        tmp_path,
        method,
        "train.batch_size=2",
        f"train.gradient_checkpointing={checkpointing}",
        f"data.resolution={side}",
    )
    training = predicted(config)

    transformer, of, state = real_model(config, torch.float32)
    known = {t.untyped_storage().data_ptr() for t in [*transformer.parameters(), *transformer.buffers()]}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    gc.collect()  # else tensors of an earlier test may be freed while this one is measured, and count as negative
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        batch = real_batch(2, side)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = (predict_velocity(transformer, of, batch).float() - batch.noise).square().mean()
        loss.backward()
        state.master.collect_gradients()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():  # the allocator's own account
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    counted = 0.05 if "dora" in method else 0.02  # PEFT forms B A of a DoRA with a graph, and frees that at once
    assert training.saved == pytest.approx(sum(saved.values()), rel=counted)
    on_the_cpu = 0.1 if "int8" in method else 0.05  # there, bitsandbytes multiplies 8-bit codes as fp32
    assert training.working == pytest.approx(peak, rel=on_the_cpu)


@pytest.mark.parametrize(
    ("dtype", "overrides"),
    [
        (torch.float32, []),
        (torch.bfloat16, ["ema={decay: 0.9}"]),
        (torch.bfloat16, ["method.rank=64", "optimizer={kind: adamw8bit}"]),
        (torch.float32, ["method.rank=8", "optimizer={kind: prodigy}"]),
        (torch.bfloat16, [FULL, "ema={decay: 0.9}"]),
        (torch.bfloat16, ["optimizer={kind: lion}"]),
        (torch.float32, ["optimizer={kind: muon}"]),
        (torch.float32, [FULL, "optimizer={kind: muon}"]),
        (torch.bfloat16, [FULL, "optimizer={kind: adafactor}"]),
        (torch.bfloat16, [FULL, "method.blocks=[1-2]"]),
        (torch.float32, ["optimizer={kind: schedulefree}"]),
        (torch.float32, ["method.rank=64", "optimizer={kind: paged_adamw8bit}"]),
        (torch.bfloat16, ["method={kind: dora, rank: 4}"]),
        (torch.bfloat16, ["method={kind: lokr, factor: 4}"]),
    ],
    ids=[
        *("lora", "ema in bf16", "adamw8bit", "prodigy", "full in bf16", "lion", "muon", "full with muon"),
        *("full with adafactor", "some blocks", "schedulefree", "paged_adamw8bit", "dora in bf16", "lokr in bf16"),
    ],
)
def test_what_stays_in_memory_is_the_sum_of_a_real_runs_tensors(
    quick_config, tmp_path: Path, dtype: torch.dtype, overrides: list[str]
) -> None:
    config = quick_config(tmp_path, *overrides)
    training = predicted(config, dtype)
    transformer, _, state = real_model(config, dtype)
    master = state.master
    update(state, config, 1e-3, lambda gradient: gradient)
    kept = list(state_tensors(state.optimizer, master.master).values())

    def nbytes(tensors: list[Tensor]) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    everything = [*transformer.parameters(), *transformer.buffers()]
    assert training.trained == master.master.numel()
    assert training.frozen == nbytes([tensor for tensor in everything if not tensor.requires_grad])
    assert training.compute == (0 if dtype is torch.float32 else nbytes([master.compute]))
    assert (training.master, training.gradient) == (nbytes([master.master]), nbytes([master.gradient]))
    assert training.average == (nbytes([state.ema]) if state.ema is not None else 0)
    assert training.optimizer == pytest.approx(nbytes(kept), rel=0.02, abs=2100)  # code books and counters aside
    assert sum(nbytes for _, nbytes in components(training)) == training.peak


@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_a_quantised_base_takes_what_its_layers_take_when_loaded(
    quick_config, tmp_path: Path, name: str, form: str
) -> None:
    pytest.importorskip("bitsandbytes")
    config = quick_config(tmp_path, f"model.base={name}", f"model.quantize={form}")
    base = resolve_base(name)
    training = rehearse_training(config, base, METHODS["lora"](config, base), (64, 64), torch.bfloat16)
    real = load_transformer(base, torch.bfloat16)
    assert training.parameters == sum(parameter.numel() for parameter in real.parameters())
    hoist(real)
    linears = [layer for layer in real.transformer_blocks.modules() if isinstance(layer, nn.Linear)]
    rest = sum(tensor.nbytes for tensor in [*real.parameters(), *real.buffers()])
    rest -= sum(layer.weight.nbytes for layer in linears)
    quantize(real, real.transformer_blocks, form, "cpu")
    held = [layer.weight for layer in real.transformer_blocks.modules() if isinstance(layer, nn.Linear)]
    codes = sum(weight.nbytes for weight in held)
    if form == "nf4":  # half a byte a weight, an fp32 scale for each 64, and a table of 16 values a layer
        assert codes == sum(layer.weight.numel() for layer in linears) // 2
        scales = codes * 2 // 64 * 4 + 64 * len(linears)
        assert scales == sum(weight.quant_state.absmax.nbytes + weight.quant_state.code.nbytes for weight in held)
    else:  # a byte a weight, and an fp32 scale a row
        assert codes == sum(layer.weight.numel() for layer in linears)
        scales = 4 * sum(layer.out_features for layer in linears)
    assert training.frozen == rest + codes + scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encoders_and_vae_take_what_they_take_when_loaded(quick_config, tmp_path: Path, dtype: torch.dtype) -> None:
    plan = forecast(forecast_inputs(quick_config(tmp_path), dtype))
    base = resolve_base("tiny")
    models = {name: load_text_encoder(base, name, dtype).model for name in ("clip_l", "clip_g", "t5")}
    models["vae"] = load_vae(base, torch.float32 if dtype is torch.float16 else dtype)
    for name, model in models.items():
        real = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers()]}
        assert plan.encoding[name].resident == sum(real.values()), name
        assert plan.encoding[name].working > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_t5_takes_less_in_8_bits_and_nothing_on_the_cpu(quick_config, tmp_path: Path, dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    plan = forecast(forecast_inputs(quick_config(tmp_path, "model.t5_quantize=int8"), dtype))
    model = load_text_encoder_in("int8", resolve_base("tiny"), "t5", dtype, "cpu", 16).model
    held = {t.data_ptr(): t.nbytes for t in [*model.parameters(), *model.buffers(), *statistics(model)]}
    assert plan.encoding["t5"].resident == sum(held.values())
    plan = forecast(forecast_inputs(quick_config(tmp_path, "model.t5_device=cpu"), dtype))
    assert "encode CLIP-L" in plan.phases
    assert "encode T5" not in plan.phases


def test_the_store_is_as_large_as_predicted(quick_config, tiny_images: Path, tmp_path: Path) -> None:
    photos = shutil.copytree(tiny_images, tmp_path / "photos")
    for name in ("1", "2"):
        with Image.open(photos / f"{name}.png") as image:
            Image.new("L", image.size, 255).save(photos / f"{name}_mask.png")
    config = quick_config(
        tmp_path / "run", f"data.sources=[{{path: {photos}}}]",
        f"data.cache_dir={tmp_path / 'store'}", "data.resolution=128", "data.crop_variants=2",
        "data.flip=true", "preview.prompts=[a, b]", "validation.holdout=1", "model.extra_t5_lengths=[300, 77]",
    )  # fmt: skip
    plan = forecast(forecast_inputs(config, torch.float32))
    run_cache(config)
    real = sum(file.stat().st_size for file in store_folder(config).glob("*.safetensors"))
    assert plan.store is not None
    assert (plan.store.texts, plan.store.images) == (
        5 + 3,
        12 + 1,
    )  # images of the bucket's shape have one crop and its mirror image
    assert plan.store.nbytes == pytest.approx(real, rel=0.05)
    store = Store(store_folder(config))
    masks = [entry["mask"] for key in store._index if "mask" in (entry := store.get(key))]
    assert plan.store.masks == len(masks) > 2
    assert plan.store.nbytes == store.nbytes(store._index)


def test_the_longest_t5_length_is_planned_for(quick_config, tmp_path: Path) -> None:
    several, longest = (
        forecast(forecast_inputs(quick_config(tmp_path, *settings), torch.float32))
        for settings in (
            ("model.extra_t5_lengths=[300, 77]",),
            ("model.max_sequence_length=300",),
        )
    )
    assert (several.training, several.encoding) == (longest.training, longest.encoding)


def products(config: Config, side: int) -> int:
    """Operations of a step's matrix products, from the shapes that each layer sees in a real forward pass.

    A layer multiplies once forward, once for its weights' gradient if they are trained, and once for its input's
    if that has one. Attention forms two products forward and five backward (Dao et al. 2022).
    """
    transformer, method, _ = real_model(config, torch.float32)
    total = 0

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        times = 1 + layer.weight.requires_grad + inputs[0].requires_grad  # type: ignore[operator, union-attr]
        total += 2 * times * output.numel() * (layer.weight.numel() // len(layer.weight))  # type: ignore[arg-type, union-attr]

    for layer in transformer.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            layer.register_forward_hook(count)
    predict_velocity(transformer, method, real_batch(1, side))
    image, text, width = (side // 16) ** 2, 77 + 16, 64
    for block in transformer.transformer_blocks:
        total += 14 * width * ((image + text) ** 2 + image**2 * block.use_dual_attention)
    return total


def hoisted_products(config: Config) -> int:
    """Of a sample: the adaLN linears', and the embedding's of timestep and pooled text that they are given."""
    transformer, _, _ = real_model(config, torch.float32)
    embedding = [layer for layer in transformer.time_text_embed.modules() if isinstance(layer, nn.Linear)]
    return sum(2 * layer.weight.numel() for layer in [*embedding, *(of.linear for of in hoisted(transformer))])


@pytest.mark.parametrize("method", [FULL, "method.rank=4", "method.targets=attention-image"])
def test_operations_are_those_of_the_products(quick_config, tmp_path: Path, method: str) -> None:
    plain = quick_config(tmp_path, method, "train.fast_path=false", "data.resolution=96")
    fast = quick_config(tmp_path, method, "data.resolution=96", "train.gradient_accumulation=3")
    assert predicted(plain).flops == products(plain, 96) + (0 if method == FULL else hoisted_products(plain))
    assert predicted(fast).flops == pytest.approx(3 * products(plain, 96), rel=0.01)


@pytest.mark.parametrize(
    ("name", "parameters", "adapter"),
    [
        ("stabilityai/stable-diffusion-3-medium-diffusers", 2.028, 9.339),
        ("stabilityai/stable-diffusion-3.5-medium", 2.243, 11.895),
        ("stabilityai/stable-diffusion-3.5-large", 8.057, 23.503),
    ],
)
def test_released_models_are_known_without_a_network(
    monkeypatch: pytest.MonkeyPatch, name: str, parameters: float, adapter: float
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    config = parse_config({"model": {"base": name}, "data": {"sources": [{"path": "/gone", "caption": "a"}]}}).config
    inputs = forecast_inputs(config, torch.bfloat16)
    transformer = empty_transformer(inputs.base)
    rows = METHODS["lora"](config, inputs.base).coverage(transformer)
    assert sum(p.numel() for p in transformer.parameters()) / 1e9 == pytest.approx(parameters, abs=5e-4)
    assert sum(row.parameters for row in rows) / 1e6 == pytest.approx(adapter, abs=5e-4)
    assert (inputs.records, inputs.largest) == (None, (1024, 1024))
    assert "no such folder" in inputs.missing[0]


def test_the_plan_says_whether_it_fits_and_what_changes_buy(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path, "model.t5=false", "method.targets=attention-image", "optimizer={kind: prodigy}")
    text = "\n".join(plan_lines(config, "4090"))
    assert "fits      into 24 GB (4090): yes" in text
    assert "at 40 % of the 165 TFLOP/s of 4090, which is an assumption" in text
    assert f"\n{BLOCK} " in text
    assert "no, " in next(line for line in plan_lines(config, memory=0.1) if line.startswith("fits"))
    assert not list(tmp_path.iterdir())  # nothing was written


@pytest.mark.long
def test_what_does_not_fit_ends_with_the_settings_that_do(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path, "model.t5=false", "model.max_sequence_length=512")
    peak = forecast(forecast_inputs(config, torch.bfloat16)).needed / 1e9
    last = list(plan_lines(config, memory=peak - 0.001))[-1]
    said = re.fullmatch(r"to fit    train.memory=\S+, or (.+): (\d\S+ [GM]B) in all", last)
    assert said is not None
    typed = ("model.t5=false", "model.max_sequence_length=512", "model.dtype=bf16", *said[1].split())
    found = forecast(forecast_inputs(quick_config(tmp_path, *typed), torch.bfloat16))
    assert (gigabytes(found.needed), found.needed / 1e9 < peak) == (said[2], True)
    assert list(plan_lines(config, memory=0.3))[-1].startswith("to fit    no settings do; train.memory: 0.3 GB cannot")
    assert "to fit" not in list(plan_lines(config, memory=peak + 0.1))[-1]


def test_without_a_gpu_the_precision_is_said(quick_config, tmp_path: Path) -> None:
    note = "note: there is no GPU here, so this plan is for the CPU, in fp32; for a GPU: --card 4090"
    config = quick_config(tmp_path)
    assert next(plan_lines(config)) == note
    assert next(plan_lines(config, "3060 12gb")) != note
    assert next(plan_lines(config, memory=8)) != note


@pytest.mark.parametrize(
    "checkpointing",
    [
        (),
        (BLOCK,),
        ("train.gradient_checkpointing=selective", "train.checkpointed_blocks=3"),
        (FULL, "train.fused_backward=true", "train.max_grad_norm=null"),
    ],
    ids=["none", "block", "a part", "updated in the backward pass"],
)
def test_a_knob_is_the_plan_of_the_configuration_that_it_names(
    quick_config, tmp_path: Path, checkpointing: tuple[str, ...]
) -> None:
    given = ("train.batch_size=2", "data.resolution=768", *checkpointing)
    inputs = forecast_inputs(quick_config(tmp_path, *given), torch.float32)
    found = knobs(inputs)
    assert len(found) >= 6
    for typed, changed in found:
        other = quick_config(tmp_path, *given, *typed.split())
        assert after(inputs, changed).config == other, typed
    sides = [after(inputs, changed).largest for typed, changed in found if typed.startswith("data.resolution")]
    assert sides
    assert all(height * width <= 512**2 for height, width in sides)


@pytest.mark.parametrize("change", ["train.batch_size=1", "model.t5_quantize=int8", "model.quantize=nf4"])
def test_what_is_taken_from_another_forecast_is_what_a_rehearsal_gives(
    quick_config, tmp_path: Path, change: str
) -> None:
    pytest.importorskip("bitsandbytes")
    given = ("train.batch_size=2", "preview.prompts=[a dog]", "data.sources.0.prior={prompt: a dog, images: 2}")
    inputs = forecast_inputs(quick_config(tmp_path, *given), torch.float32)
    (changed,) = [changed for typed, changed in knobs(inputs) if typed.startswith(change)]
    other = after(inputs, changed)
    found = forecast(other, forecast(inputs))
    assert found == forecast(other)
    assert found.drawing is not None


def test_cards_have_their_precision(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path)
    assert planned_dtype(config, GPUS["t4"], None) is torch.float16
    assert planned_dtype(config, GPUS["4090"], None) is torch.bfloat16
    assert planned_dtype(config, None, 24.0) is torch.bfloat16
    assert planned_dtype(config, None, None) is torch.float32
    with pytest.raises(ConfigError, match="has no bf16"):
        planned_dtype(quick_config(tmp_path, "model.dtype=bf16"), GPUS["t4"], None)


def test_a_full_size_base_takes_what_the_page_says() -> None:
    """And what was counted elsewhere: SD3.5 medium has 2.243 billion parameters, a step with 154 tokens 27.7 TFLOP."""
    config = load_config(ROOT / "configs" / "dreambooth_sd35_medium.yaml").config
    inputs = forecast_inputs(config, torch.bfloat16)
    method = METHODS["lora"](inputs.config, inputs.base)
    training = rehearse_training(inputs.config, inputs.base, method, inputs.largest, torch.bfloat16)
    assert training.parameters == pytest.approx(2.243e9, rel=1e-3)
    assert training.flops == pytest.approx(27.7e12, rel=0.01)
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    rows = {row[0]: row[2] for row in re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)}
    assert rows["training, peak"] == gigabytes(training.peak)
    assert rows["of which activations saved for the backward pass"] == gigabytes(training.saved)
    assert rows["operations of a step, TFLOP"] == f"{training.flops / 1e12:.1f}"


def test_eight_bit_moments_of_a_whole_full_size_model_save_what_they_are_smaller_by() -> None:
    """Also at the peak, though its step reads them as fp32: it does so in chunks."""
    medium = load_config(ROOT / "configs" / "dreambooth_sd35_medium.yaml", ["method={kind: full}"]).config
    wide, narrow = (
        predicted(medium.model_copy(update={"optimizer": settings}), torch.bfloat16)
        for settings in (AdamWConfig(), AdamW8bitConfig())
    )
    assert wide.optimizer == 8 * wide.trained
    assert narrow.optimizer == pytest.approx((2 + 8 / 256) * narrow.trained, rel=0.02)
    assert narrow.peak - narrow.resident == wide.peak - wide.resident


def test_without_bitsandbytes_only_what_needs_it_is_left_out(quick_config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    typed = [change for change, _ in knobs(forecast_inputs(quick_config(tmp_path), torch.float32))]
    assert "model.quantize=int8" in typed
    assert "model.t5_quantize=int8" in typed
    assert not {"model.quantize=nf4", "optimizer.kind=adamw8bit"} & set(typed)


def test_a_whole_full_size_model_fits_24_gb_if_it_is_updated_in_the_backward_pass() -> None:
    """And the page says how much it takes, and by which command."""
    page = (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")
    (words,) = re.findall(r"^sd3tune plan \S+ --card h100 (.*fused_backward=true)$", page, re.MULTILINE)
    config = load_config(ROOT / "configs" / "dreambooth_sd35_medium.yaml", shlex.split(words)).config
    found = forecast(forecast_inputs(config, torch.bfloat16))
    assert found.training.gradient == 0
    assert found.needed < 24e9
    assert f"| {gigabytes(found.training.resident)} |\n| training, peak" in page
    assert f"| {gigabytes(found.training.peak)} |\n| drawing a preview" in page
    assert f"| {gigabytes(found.phases['preview'].peak)} |\n\n" in page


def test_the_update_in_the_backward_pass_is_listed_where_it_can_be_set(quick_config, tmp_path: Path) -> None:
    def listed(*settings: str) -> list[str]:
        inputs = forecast_inputs(quick_config(tmp_path, *settings), torch.float32)
        return [typed for typed, _ in knobs(inputs) if "fused_backward" in typed]

    both = "train.fused_backward=true train.max_grad_norm=null"
    assert listed(FULL) == [both]
    assert not listed()
    assert not listed(FULL, *both.split())
    assert not listed(FULL, "train.gradient_accumulation=2")
    assert not listed(FULL, "optimizer={kind: prodigy}")
    config = quick_config(tmp_path, FULL, "optimizer.kind=adamw8bit", BLOCK, "data.resolution=512")
    assert both in training_knob(config, METHODS["full"](config, resolve_base("tiny")), blocks=4)


@pytest.mark.long
def test_several_processes_divide_the_blocks_and_see_more_images(quick_config, tmp_path: Path) -> None:
    config = quick_config(tmp_path, "train.sharding=fsdp")
    one, four = (list(plan_lines(config, processes=processes)) for processes in (1, 4))
    assert any("train.sharding has no effect with one process" in line for line in one)
    assert "processes 4; they divide the transformer's blocks; memory and time are those of each" in four
    assert any(line.startswith("steps     3 x 4 images, 12 images seen") for line in four)
    assert any("a gathered block, and the buffer of the next" in line for line in four)
    refused = ("train.swap_blocks", "model.quantize")  # knobs that `train.sharding` does not allow
    assert not any(line.startswith(refused) for line in four)
