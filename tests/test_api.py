"""`import sd3tune`: what is public, that it does what the commands do, and that it leaves the process alone."""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sd3tune
from sd3tune.adapter.metadata import CONTRACT_KEY
from sd3tune.config import dump_config
from sd3tune.config.schema import Config
from tests.conftest import Command

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "PIL", "tqdm")

# What is public.


def test_the_public_names_are_these() -> None:
    assert sorted(sd3tune.__all__) == [
        "AdapterError",
        "Callback",
        "Config",
        "ConfigError",
        "DataError",
        "Evaluation",
        "Interrupted",
        "MeasureUnavailable",
        "ModelError",
        "ProcessError",
        "Run",
        "RunError",
        "RunPlan",
        "UserError",
        "View",
        "__version__",
        "evaluate",
        "generate",
        "load_config",
        "lora",
        "plan",
        "reporting",
        "train",
    ]
    assert set(sd3tune.__all__) <= set(dir(sd3tune))
    assert sorted(sd3tune.lora.__all__) == [
        "convert",
        "extract",
        "inspect",
        "merge",
        "merge_into_base",
        "resize",
        "verify",
    ]


def test_public_names_stay_what_they_are_when_every_module_has_been_imported() -> None:
    for found in pkgutil.walk_packages(sd3tune.__path__, "sd3tune."):
        if found.name != "sd3tune.__main__":
            importlib.import_module(found.name)
    modules = {name for name in sd3tune.__all__ if isinstance(getattr(sd3tune, name), ModuleType)}
    assert modules == {"lora", "reporting"}
    for name in set(sd3tune.__all__) - modules - {"__version__"}:
        thing = getattr(sd3tune, name)
        assert callable(thing), name
        assert thing.__doc__, name
    for name in sd3tune.lora.__all__:
        assert getattr(sd3tune.lora, name).__doc__, name


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sd3tune' has no attribute 'trian'"):
        sd3tune.trian  # noqa: B018


def test_the_types_are_those_of_the_lazy_names() -> None:
    """What `TYPE_CHECKING` tells editors is what is imported when a name is used."""
    source = Path(sd3tune.__file__).read_text(encoding="utf-8")
    told = source.partition("if TYPE_CHECKING:\n")[2].partition("\n\n")[0]
    names: dict[str, object] = {}
    exec("\n".join(line.removeprefix("    ") for line in told.splitlines()), names)
    assert set(names) - {"__builtins__"} == set(sd3tune.__all__) - {"__version__"}
    assert all(getattr(sd3tune, name) is names[name] for name in names if name != "__builtins__")


def test_importing_it_and_configuring_a_run_load_no_torch(tmp_path: Path) -> None:
    """In a fresh interpreter, as this one has imported everything."""
    code = f"""
import sys
import sd3tune
sd3tune.Config(data={{"sources": [{{"path": "dog"}}]}})
sd3tune.lora, sd3tune.reporting, sd3tune.plan, sd3tune.train, sd3tune.load_config, sd3tune.UserError
print(*sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ran.stdout == "\n"


# Configurations.


def test_a_configuration_built_in_code_is_the_one_of_a_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    built = sd3tune.Config(
        name="rex",
        output_dir=Path("runs/rex"),
        model={"base": "tiny"},
        data={"sources": ({"path": Path("dog"), "caption": "a photo of sks dog"},)},
        train={"steps": 5},
    )
    (tmp_path / "rex.yaml").write_text(dump_config(built))
    assert type(built) is Config
    assert built == sd3tune.load_config("rex.yaml")
    assert built.output_dir == str(tmp_path / "runs" / "rex")
    assert built.data.sources[0].path == str(tmp_path / "dog")

    again = sd3tune.Config(name="max", model=built.model, data=built.data, train={**dict(built.train), "steps": 9})
    assert (again.model, again.data, again.train.steps) == (built.model, built.data, 9)
    assert sd3tune.load_config(tmp_path / "rex.yaml", ["train.steps=7"]).train.steps == 7


def test_mistakes_in_code_are_a_line_each(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sd3tune.ConfigError) as caught:
        sd3tune.Config(data={"sources": [{"path": "dog"}]}, trian={}, train={"steps": -5})
    assert caught.value.problems == (
        "config: train.steps: -5 is too small; at least 1",
        "config: trian: unknown key; did you mean 'train'?",
    )
    with pytest.raises(sd3tune.ConfigError, match=r"schedule\.warmup_steps is 20 but train.steps is 5"):
        sd3tune.Config(
            data={"sources": [{"path": "dog"}]}, train={"steps": 5}, schedule={"kind": "constant", "warmup_steps": 20}
        )
    with pytest.raises(sd3tune.ConfigError, match="config: data: missing"):
        sd3tune.Config()


def test_the_keys_that_editors_are_told_are_those_of_the_schema() -> None:
    import ast
    import inspect

    tree = ast.parse(inspect.getsource(sys.modules[Config.__module__]))
    (init,) = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__")
    assert {argument.arg for argument in init.args.kwonlyargs} == set(Config.model_fields)


def test_notes_about_a_configuration_are_reported(quick_config, tmp_path: Path, capsys) -> None:
    file = tmp_path / "rex.yaml"
    file.write_text(dump_config(quick_config(tmp_path / "run")))
    sd3tune.load_config(file, ["optimizer.kind=prodigy"])
    assert "note: override optimizer.kind=prodigy: dropped optimizer.lr" in capsys.readouterr().err


# Plans.


def test_a_plan_is_figures_and_the_text_of_the_command(
    quick_config, tmp_path: Path, command: Command, monkeypatch
) -> None:
    monkeypatch.setattr("sd3tune.commands.plan.knobs", lambda inputs: [])  # each is another rehearsal
    config = quick_config(tmp_path / "run")
    plan = sd3tune.plan(config, card="4090")
    (tmp_path / "rex.yaml").write_text(dump_config(config))
    monkeypatch.setattr("sd3tune.commands.plan.forecast", lambda *_: plan.forecast)  # rehearsed once, for all
    assert f"{plan}\n" == command("plan", tmp_path / "rex.yaml", "--card", "4090").out
    assert plan.fits is True
    assert plan.room == 24_000_000_000
    assert plan.needed > max(row["peak"] for row in plan.phases) > 0
    assert [row["phase"] for row in plan.phases][-1] == "train"
    assert plan.system.needed > max(row["system"] for row in plan.phases) > 0
    assert (plan.steps, plan.config) == (3, config)
    assert plan.store > 0
    assert plan.step_seconds > 0
    assert plan._repr_html_().startswith("<pre>base")
    assert sd3tune.plan(config, memory=0.001, utilisation=50).fits is False
    assert sd3tune.plan(config).fits is None
    with pytest.raises(sd3tune.ConfigError, match="memory=-1: give"):
        sd3tune.plan(config, memory=-1)


# Runs.


class Noted:
    """A callback that keeps what it may see, and stops as a user would, by Ctrl-C, after a step or in the next one."""

    def __init__(self, stop: int | None = None, inside: bool = False) -> None:
        self.steps: list[int] = []
        self.losses: list[float | None] = []
        self.stop, self.inside = stop, inside

    def __call__(self, view: sd3tune.View) -> None:
        self.steps.append(view.step)
        self.losses.append(view.metrics.get("loss"))
        if view.step == self.stop and not self.inside:
            raise KeyboardInterrupt
        if view.step == self.stop:
            view.transformer.register_forward_hook(_interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def state_of_the_process() -> tuple[object, ...]:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    hidden = {name for name, module in sys.modules.items() if module is None}
    return (*handlers, gc.isenabled(), gc.get_freeze_count() > 0, hidden, dict(os.environ))


def test_a_run_is_returned_with_what_came_of_it(quick_config, tmp_path: Path, capsys) -> None:
    config, noted, before = quick_config(tmp_path / "run"), Noted(), state_of_the_process()
    run = sd3tune.train(config, callbacks=[noted])
    assert state_of_the_process() == before
    assert "adapter   " in capsys.readouterr().out
    assert isinstance(run, sd3tune.Run)
    assert Path(run) == run.folder == tmp_path / "run"
    assert noted.steps == [0, 1, 2, 3]
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    assert noted.losses[-1] is not None
    assert run.report["changes_output"] is True
    assert run.adapter == run.product == tmp_path / "run" / "adapter"
    assert "3" in run._repr_html_()
    assert sd3tune.train(config, resume=True) == run
    with pytest.raises(sd3tune.UserError, match="already holds a run"):
        sd3tune.train(config)


def test_ctrl_c_saves_the_last_whole_step_and_raises(quick_config, tmp_path: Path, assert_equal_runs) -> None:
    """Between two steps, and within one; what is resumed is as if it had never stopped."""
    settings = ("train.steps=4", "ema={decay: 0.5}", "train.log_every=3", "checkpoint.keep=1")
    sd3tune.train(quick_config(tmp_path / "straight", *settings))
    config = quick_config(tmp_path / "stopped", *settings)
    with pytest.raises(sd3tune.Interrupted, match="stopped before the first checkpoint"):
        sd3tune.train(config, callbacks=[Noted(stop=0, inside=True)])
    with pytest.raises(sd3tune.Interrupted, match="stopped, saved at step-000001"):
        sd3tune.train(config, callbacks=[Noted(stop=1)])
    with pytest.raises(sd3tune.Interrupted, match="stopped, saved at step-000003"):
        sd3tune.train(config, resume=True, callbacks=[Noted(stop=3, inside=True)])
    sd3tune.train(config, resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "stopped")


def test_an_update_that_was_cut_off_is_not_saved(quick_config, tmp_path: Path, monkeypatch) -> None:
    from sd3tune.training.flat_master import FlatMaster

    genuine, calls = FlatMaster.publish, []

    def publish(self: FlatMaster) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        genuine(self)

    monkeypatch.setattr(FlatMaster, "publish", publish)
    with pytest.raises(sd3tune.Interrupted, match="stopped before the first checkpoint"):
        sd3tune.train(quick_config(tmp_path / "run", "train.steps=9"))


def test_ctrl_c_while_checking_is_the_same_error(quick_config, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sd3tune.commands.train.make_plan", _interrupt)
    with pytest.raises(sd3tune.Interrupted, match="stopped; every file that was written is complete"):
        sd3tune.train(quick_config(tmp_path / "run"))


def test_signals_are_handled_where_that_is_asked_for(quick_config, tmp_path: Path) -> None:
    before = state_of_the_process()

    def terminate(view: sd3tune.View) -> None:
        if view.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    config = quick_config(tmp_path / "run", "train.steps=9")
    with pytest.raises(sd3tune.Interrupted, match=r"saved at step-00000[12];"):
        sd3tune.train(config, callbacks=[terminate], handle_signals=True)
    assert state_of_the_process() == before


def test_a_process_of_a_launcher_raises_too(quick_config, tmp_path: Path, monkeypatch) -> None:
    """The command would end the process, and leave its problem to the one that launched it."""
    left, config = tmp_path / "left", quick_config(tmp_path / "file")
    left.mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setenv("SD3TUNE_ERRORS", str(left))
    with pytest.raises(sd3tune.UserError, match="file is a file; name a folder"):
        sd3tune.train(config)
    assert list(left.iterdir()) == []


# Adapters.


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory: pytest.TempPathFactory) -> sd3tune.Run:
    with sd3tune.reporting.using(sd3tune.reporting.Reporter(quiet=True)):
        return sd3tune.train(quick_config(tmp_path_factory.mktemp("api") / "run", "train.steps=1"))


def test_adapters_are_converted_resized_merged_and_looked_at(run: sd3tune.Run, tmp_path: Path, capsys) -> None:
    converted = sd3tune.lora.convert(run, to="kohya", out=tmp_path / "kohya.safetensors", thumbnail=False)
    assert capsys.readouterr().out.startswith(f"{converted}: ")
    looked = sd3tune.lora.inspect(converted)
    assert looked[0] == f"{converted}: a LoRA in kohya's layout"
    assert str(looked).splitlines() == list(looked)
    assert looked._repr_html_().startswith("<pre>")

    smaller = sd3tune.lora.resize(run, out=str(tmp_path / "small.safetensors"), rank=1)
    assert "rank      1" in sd3tune.lora.inspect(smaller)
    both = sd3tune.lora.merge([run, (converted, 0.5)], out=tmp_path / "both.safetensors")
    assert "rank      4" in sd3tune.lora.inspect(both)
    assert json.loads(_metadata(both)[CONTRACT_KEY])["merged"][1]["weight"] == 0.5
    assert sd3tune.lora.verify(run, preview=False)[0].endswith("none left over")
    merged = sd3tune.lora.merge_into_base([run], out=tmp_path / "merged")
    assert (merged / "model_index.json").is_file()
    with pytest.raises(sd3tune.RunError, match="exists already"):
        sd3tune.lora.resize(run, out=smaller, rank=1)


def _metadata(file: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def test_a_run_without_weights_and_one_of_a_whole_model_say_so(tmp_path: Path) -> None:
    with pytest.raises(sd3tune.RunError, match="holds no trained weights"):
        sd3tune.Run(tmp_path).product  # noqa: B018
