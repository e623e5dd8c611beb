"""docs/scale.md: its tables are the computed ones, and their constants describe the code as it is."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from benchmarks import scale
from sd3tune.config import parse_config
from sd3tune.data.records import Record
from sd3tune.data.sampler import epoch_order
from sd3tune.data.store import Entry, key
from sd3tune.encode.captions import entry_bytes
from sd3tune.encode.images import bytes_per_pixel
from sd3tune.forecast.forecast import ForecastInputs, forecast, forecast_inputs
from sd3tune.forecast.gpus import GPUS
from sd3tune.training.examples import Example

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text("utf-8")
ENCODERS = {"CLIP-L": "clip_l", "CLIP-G": "clip_g", "T5": "t5"}
BASES = {name: f"stabilityai/stable-diffusion-{name[2:].replace(' ', '-')}" for name in scale.PARAMETERS}


def inputs(base: str, kind: str) -> ForecastInputs:
    values = {
        "model": {"base": BASES[base], "max_sequence_length": 256},
        "method": {"kind": kind, **({"rank": 16, "alpha": 16} if kind == "lora" else {})},
        "data": {"sources": [{"path": "/nowhere", "caption": "a"}]},
        "train": {"gradient_checkpointing": "block"},
    }
    return forecast_inputs(parse_config(values).config, torch.bfloat16)


@pytest.mark.parametrize("table", scale.TABLES, ids=lambda table: table.__name__)
def test_the_page_has_the_computed_table(table) -> None:
    assert table() in PAGE, "docs/scale.md is not current: python -m benchmarks.scale"


def test_the_bytes_are_those_of_the_store() -> None:
    base = inputs("SD3.5 medium", "lora").base
    found = scale.store_bytes()
    assert found["moments in fp32, as stored"] == bytes_per_pixel(base) * 1024**2
    for name, encoder in ENCODERS.items():
        assert found[name] == entry_bytes(base, encoder, torch.bfloat16, 256)
    assert found["T5 at 77 tokens"] == entry_bytes(base, "t5", torch.bfloat16, 77)
    assert {card: GPUS[card.lower()].tflops for card in scale.CARDS} == scale.CARDS


def test_a_ring_sends_what_its_steps_send() -> None:
    """Counted chunk by chunk: n - 1 steps of an n-th each for a reduce-scatter, and as many for an all-gather."""
    parameters, adapter = 1600.0, 160.0
    sent = sum(4 * parameters / scale.GPUS for _ in range(2 * (scale.GPUS - 1)))
    assert scale.network_bytes(parameters, adapter)["whole, DDP"] == pytest.approx(sent)
    three = sum(nbytes * parameters / scale.GPUS for nbytes in (2, 2, 4) for _ in range(scale.GPUS - 1))
    assert scale.network_bytes(parameters, adapter)["whole, FSDP or ZeRO-3"] == pytest.approx(three)


@pytest.mark.long
@pytest.mark.parametrize("base", scale.PARAMETERS)
def test_the_operations_of_a_step_are_those_of_the_plan(base: str) -> None:
    for kind, name in (("lora", "adapter"), ("full", "whole")):
        plan = forecast(inputs(base, kind))
        assert scale.STEP_TFLOP[base][name] == pytest.approx(plan.flops / 1e12, rel=2e-3)
        expected = scale.ADAPTER[base] if kind == "lora" else scale.PARAMETERS[base]
        assert plan.training.trained == pytest.approx(expected, rel=1e-3)


@pytest.mark.long
def test_the_operations_of_the_encoders_are_torchs_count() -> None:
    base = inputs("SD3.5 medium", "lora").base
    found = {}

    def count(name: str, run) -> None:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        found[name] = counter.get_total_flops() / 1e12

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(base.config("vae"))
        count("VAE", lambda: vae.encode(torch.empty(1, 3, 1024, 1024)))
        for name, part in (("CLIP-L", "text_encoder"), ("CLIP-G", "text_encoder_2")):
            clip = CLIPTextModelWithProjection(CLIPTextConfig(**base.config(part)))
            count(name, lambda model=clip: model(torch.zeros(1, 77, dtype=torch.long)))
        t5 = T5EncoderModel(T5Config(**base.config("text_encoder_3")))
        count("T5", lambda: t5(torch.zeros(1, 256, dtype=torch.long)))
    assert found == pytest.approx(scale.ENCODING_TFLOP, rel=1e-3)


@pytest.mark.long
def test_the_sizes_of_objects_are_those_of_python() -> None:
    """They differ between Python versions, by some ten per cent."""
    count, shard = 20_000, Path("/store/shard")
    texts = [f"a photo number {number} of a thing that is described in some words" for number in range(count)]
    encoders = ("clip_l", "clip_g", "t5")
    made = {
        "record": lambda n: Record(Path(f"/data/set/image-{n}.png"), f"{texts[n]}.", 1, 0),
        "example": lambda n: Example(
            f"image-{n}.png", (key("i", n=n),), {name: key(name, n=n) for name in encoders}, (1024, 1024)
        ),
        "entry of the store": lambda n: (key("e", n=n), Entry(shard, ["mean", "std"], 9, f"{n:032x}")),
    }
    found = {}
    for name, make in made.items():
        tracemalloc.start()
        kept = [make(number) for number in range(count)]
        found[name] = tracemalloc.get_traced_memory()[0] / len(kept)
        tracemalloc.stop()
    tracemalloc.start()
    order = epoch_order(0, 0, count)
    found["order of an epoch"] = tracemalloc.get_traced_memory()[0] / len(order)
    tracemalloc.stop()
    assert found == pytest.approx(scale.HOST_BYTES, rel=0.25)
