"""Throw-away variants of every kind, registered from outside the package and used by a run on tiny."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jsonschema
import pytest
import torch
from PIL import Image
from prodigyopt import Prodigy
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from sd3tune.adapter.file import read_adapter
from sd3tune.adapter.layouts import LAYOUTS, Layout, register_layout, unregister_layout
from sd3tune.commands.lora_convert import convert_lora
from sd3tune.commands.train import run_training
from sd3tune.config import Config, json_schema, load_config, parse_config
from sd3tune.config.sections.data import Source
from sd3tune.config.sections.flow import LossSection, TimestepsSection, WeightingSection
from sd3tune.config.sections.key import CONTENT, WRITTEN, Identity, Key
from sd3tune.config.sections.method import LoraConfig
from sd3tune.config.sections.optimizer import OptimizerSection
from sd3tune.config.sections.schedule import ScheduleSection
from sd3tune.data.sources.folder import Listing
from sd3tune.data.sources.registry import SOURCES, register_source
from sd3tune.errors import ConfigError, RunError
from sd3tune.forecast.forecast import forecast, forecast_inputs
from sd3tune.measures.encoders import REGISTERED, unregister
from sd3tune.methods import METHODS, LoraMethod, register
from sd3tune.training.loop import View
from sd3tune.training.objective import (
    DENSITIES,
    LOSSES,
    WEIGHTS,
    register_loss,
    register_timesteps,
    register_weighting,
)
from sd3tune.training.optimizers import OPTIMIZERS, register_optimizer
from sd3tune.training.schedules import SCHEDULES, register_schedule

ROOT = Path(__file__).parents[2]
REGISTRIES = (METHODS, OPTIMIZERS, SCHEDULES, DENSITIES, WEIGHTS, LOSSES, SOURCES)


class DecayedConfig(LoraConfig):
    """A LoRA whose loss has a term of its own."""

    kind: Annotated[Literal["decayed"], WRITTEN] = Field("decayed")  # type: ignore[assignment]
    decay: Annotated[float, Key(Identity.WRITTEN, contract=True)] = Field(
        0.01, gt=0, description="Factor on the squares of B."
    )


class Decayed(LoraMethod):
    def extra_loss(self, transformer: Any, batch: Any) -> Tensor:
        rows = [p for name, p in transformer.named_parameters() if "lora_B" in name]
        return self.settings.decay * sum(row.float().square().sum() for row in rows)  # type: ignore[attr-defined]


class ForeignConfig(OptimizerSection):
    """The optimizer of a package, which knows nothing of this one."""

    kind: Literal["foreign"] = "foreign"
    lr: float = Field(1.0, gt=0)
    d0: float = Field(1e-3, gt=0)


class StairsConfig(ScheduleSection):
    """Half the rate from the middle on."""

    kind: Literal["stairs"] = "stairs"
    drop: float = Field(0.5, gt=0)


class SquaredConfig(TimestepsSection):
    """sigma = u^power."""

    kind: Literal["squared"] = "squared"
    power: float = Field(2.0, gt=0)


class RisingConfig(WeightingSection):
    """w = sigma^power, of mean 1."""

    kind: Literal["rising"] = "rising"
    power: float = Field(1.0, gt=0)


class QuarticConfig(LossSection):
    """|v - target|^power."""

    kind: Literal["quartic"] = "quartic"
    power: float = Field(4.0, gt=0)


def quartic(settings: QuarticConfig, prediction: Tensor, target: Tensor, sigma: Tensor, done: float) -> Tensor:
    assert sigma.shape == (len(target),)
    assert 0 <= done < 1
    return (prediction - target).abs().pow(settings.power).flatten(1).mean(1)


class PaletteConfig(Source):
    """Pictures of one colour, kept nowhere."""

    kind: Annotated[Literal["palette"], CONTENT] = "palette"
    path: Annotated[str, CONTENT] = "palette"
    colours: Annotated[list[str], CONTENT] = Field(min_length=1)


@dataclass(frozen=True)
class Swatch:
    name: str

    def read_bytes(self) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (64, 64), self.name).save(buffer, format="PNG")
        return buffer.getvalue()

    def __str__(self) -> str:
        return f"palette:{self.name}"


def swatches(source: PaletteConfig) -> Listing:
    return Listing([(Swatch(colour), f"a {colour} square") for colour in source.colours])


BACKWARDS = Layout("backwards", "edams_", original=True, flat=True, form="edams", halves=("lora_A", "lora_B"))


def prodigy(settings: ForeignConfig, master: nn.Parameter) -> torch.optim.Optimizer:
    return Prodigy([master], lr=settings.lr, d0=settings.d0)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    before, schema = [dict(registry) for registry in REGISTRIES], json_schema()
    with ExitStack() as stack:
        register(DecayedConfig, Decayed)
        stack.callback(METHODS.unregister, "decayed")
        register_optimizer(ForeignConfig, prodigy)
        stack.callback(OPTIMIZERS.unregister, "foreign")
        register_schedule(StairsConfig, lambda settings, progress: 1.0 if progress < 0.5 else settings.drop)
        stack.callback(SCHEDULES.unregister, "stairs")
        register_timesteps(SquaredConfig, lambda settings, u: u**settings.power)
        stack.callback(DENSITIES.unregister, "squared")
        register_weighting(RisingConfig, lambda settings, sigma: sigma**settings.power)
        stack.callback(WEIGHTS.unregister, "rising")
        register_loss(QuarticConfig, quartic)
        stack.callback(LOSSES.unregister, "quartic")
        register_source(PaletteConfig, swatches)
        stack.callback(SOURCES.unregister, "palette")
        register_layout(BACKWARDS)
        stack.callback(unregister_layout, BACKWARDS)
        yield
    assert [dict(registry) for registry in REGISTRIES] == before
    assert BACKWARDS not in LAYOUTS
    assert json_schema() == schema
    with pytest.raises(ConfigError, match="'foreign' is not one of: adamw, adamw8bit, prodigy, lion"):
        parse_config({**VALUES, "method": {}, "optimizer": {"kind": "foreign"}})


VALUES: dict[str, Any] = {
    "name": "outside",
    "model": {"base": "tiny", "max_sequence_length": 16, "t5": False},
    "method": {"kind": "decayed", "rank": 2, "decay": 0.1},
    "data": {"sources": [{"kind": "palette", "colours": ["red", "blue"]}], "resolution": 64},
    "flow": {
        "shift": 1.0,
        "timesteps": {"kind": "squared", "power": 3.0},
        "weighting": {"kind": "rising"},
        "loss": {"kind": "quartic", "power": 3.0},
    },
    "optimizer": {"kind": "foreign"},
    "schedule": {"kind": "stairs", "drop": 0.25},
    "train": {"steps": 4, "log_every": 1},
    "checkpoint": {"every": 1},
}


def config_of(run: Path, *overrides: str) -> Config:
    return parse_config({**VALUES, "output_dir": str(run)}, overrides).config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seams") / "run"
    run_training(config_of(folder))
    return folder


def test_a_run_of_variants_from_outside_says_what_it_used(run: Path, lines_of) -> None:
    adapter, lines = read_adapter(run), lines_of(run)
    assert adapter.contract["method"] == "decayed"
    assert adapter.contract["decay"] == 0.1
    assert adapter.contract["timesteps"] == {"kind": "squared", "power": 3.0}
    assert adapter.contract["weighting"] == {"kind": "rising", "power": 1.0}
    assert adapter.contract["loss"] == {"kind": "quartic", "power": 3.0}
    assert [line["lr"] for line in lines] == [1.0, 1.0, 0.25, 0.25]
    assert any(up.any() for _, up in adapter.factors.values())
    assert "squared (power 3)" in (run / "README.md").read_text()
    assert load_config(run / "config.yaml").config == config_of(run)


def test_a_stopped_run_resumes_to_the_same_bytes(run: Path, tmp_path: Path, assert_equal_runs) -> None:
    """With an optimizer that keeps numbers beside its tensors, and makes both in its first step."""

    def stop(view: View) -> None:
        if view.step == 2:
            raise InterruptedError

    config = config_of(tmp_path / "run")
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop])
    saved = json.loads((tmp_path / "run/checkpoints/step-000002/state.json").read_text())
    assert saved["optimizer"]["group"]["k"] == 2
    assert saved["optimizer"]["group"]["d_numerator"] != 0
    run_training(config, resume=True)
    assert_equal_runs(run, tmp_path / "run")
    for change in ("method.decay=0.2", "optimizer.d0=0.1", "flow.timesteps.power=1.0", "schedule.drop=0.9"):
        with pytest.raises(RunError, match=change.partition("=")[0]):
            run_training(config_of(run, change, "train.steps=4"), resume=True)


def test_the_extra_term_is_part_of_what_is_minimised(run: Path, tmp_path: Path, adapter_of) -> None:
    run_training(config_of(tmp_path / "run", "method.decay=1e-9"))
    size, free = (sum(t.square().sum() for t in adapter_of(of).values()) for of in (run, tmp_path / "run"))
    assert size != free


def test_the_forecast_knows_them(tmp_path: Path) -> None:
    found = forecast(forecast_inputs(config_of(tmp_path), torch.bfloat16))
    assert found.store is not None
    assert found.store.images == 2
    assert found.training.optimizer == pytest.approx(3 * 4 * found.training.trained, rel=0.01)  # three fp32 tensors


def test_the_layout_is_written_and_read(run: Path, tmp_path: Path) -> None:
    convert_lora(run, "edams", tmp_path / "a.safetensors")
    keys = load_file(tmp_path / "a.safetensors").keys()
    assert keys
    assert all(key.startswith("edams_joint_blocks_") for key in keys)
    there, back = read_adapter(run).folded(), read_adapter(tmp_path / "a.safetensors")
    assert back.layout == "backwards"
    assert {name: pair[1] @ pair[0] for name, pair in there.items()}.keys() == back.factors.keys()
    for name, (down, up) in back.folded().items():
        torch.testing.assert_close(up @ down, there[name][1] @ there[name][0])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("schedule.drop=-1", "schedule.drop=-1: -1 is too small; must be above 0"),
        ("schedule.dorp=1", "schedule.dorp=1: unknown key; did you mean 'drop'?"),
        ("optimizer.kind=foriegn", "adafactor, schedulefree, paged_adamw8bit, foreign"),
        (
            "optimizer.betas=[0.9, 0.9]",
            "optimizer.betas=[0.9, 0.9]: unknown key with kind foreign; it belongs to kind adamw",
        ),
        ("data.sources.0.colours=[]", "data.sources.0.colours=[]: [] has 0 entries; at least 1"),
    ],
)
def test_their_keys_are_as_strict_as_all_others(tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path, override)
    assert problem in caught.value.problems[0]


def test_the_json_schema_has_them() -> None:
    schema = json_schema()
    jsonschema.validate(VALUES, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**VALUES, "schedule": {"kind": "stairs", "drop": "far"}}, schema)


def test_what_cannot_be_registered_is_refused() -> None:
    class Alien(ScheduleSection):
        kind: str = "alien"

    class Torn(ScheduleSection):
        kind: Literal["torn", "whole"] = "torn"

    schedules, flat = [ForeignConfig, Alien, Torn, StairsConfig], Layout("x", "x_", form="kohya")
    for section, problem in zip(schedules, ("a subclass", "has no kind", "only value", "already"), strict=True):
        with pytest.raises(ValueError, match=problem):
            register_schedule(section, lambda settings, progress: 1.0)  # type: ignore[arg-type]
    for layout, problem in ((flat, "already"), (Layout("x", "x_", form="x", halves=("down", "up")), "not read as one")):
        with pytest.raises(ValueError, match=problem):
            register_layout(layout)
    assert list(SCHEDULES)[:2] == ["constant", "cosine"]
    assert list(SCHEDULES)[-1] == "stairs"
    assert LAYOUTS[0] == BACKWARDS


BLOCKS = re.findall(r"```python\n(.+?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[-1].partition("(")[0])
def test_the_page_on_how_to_add_works(block: str) -> None:
    """Each block registers one variant."""
    before, layouts, encoders = [set(registry) for registry in REGISTRIES], list(LAYOUTS), set(REGISTERED)
    namespace: dict[str, Any] = {"__name__": "contributed"}
    exec(compile(block, "CONTRIBUTING.md", "exec", dont_inherit=True), namespace)
    found = [(of, kind) for of, known in zip(REGISTRIES, before, strict=True) for kind in set(of) - known]
    made = [layout for layout in LAYOUTS if layout not in layouts]
    for registry, kind in found:
        registry.unregister(kind)
    for layout in made:
        unregister_layout(layout)
    added = set(REGISTERED) - encoders
    for name in added:
        unregister(name)
    assert len(found) + len(made) + len(added) == 1


def test_the_page_has_each_kind() -> None:
    assert len(BLOCKS) == len(REGISTRIES) + 2  # layouts and encoders
