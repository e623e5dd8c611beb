"""The command line. Torch and diffusers are imported inside commands, so that `--help` is instant."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from sd3tune import __version__
from sd3tune.cli.arguments import ConfigArgument, Json, Overrides, Quiet, print_notes, take_reporter
from sd3tune.cli.cache import cache_app
from sd3tune.cli.completion import complete_preset
from sd3tune.cli.data import data_app
from sd3tune.cli.eval import evaluate
from sd3tune.cli.fast_exit import exit_fast
from sd3tune.cli.hub import hub_app
from sd3tune.cli.imports import quick_imports, spin_briefly
from sd3tune.cli.infer import infer
from sd3tune.cli.lora import lora_app
from sd3tune.cli.outcome import EXIT_CODES, run_app
from sd3tune.cli.runs import report, runs
from sd3tune.cli.sweep import sweep
from sd3tune.cli.ui import ui
from sd3tune.config import dump_config, json_schema, load_config
from sd3tune.errors import ConfigError
from sd3tune.reporting import result, using
from sd3tune.runtime.environment import grow_segments

app = typer.Typer(
    help="Fine-tune Stable Diffusion 3 and 3.5 with LoRA.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Create, show and check configurations.", no_args_is_help=True)
base_app = typer.Typer(help="Base models.", no_args_is_help=True)
app.command()(infer)
app.command()(runs)
app.command()(report)
app.command("eval")(evaluate)
app.command()(sweep)
app.command()(ui)
app.add_typer(cache_app, name="cache")
app.add_typer(data_app, name="data")
app.add_typer(lora_app, name="lora")
app.add_typer(config_app, name="config")
app.add_typer(hub_app, name="hub")
app.add_typer(base_app, name="base")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the picture.")] = Path("runs/demo"),
) -> None:
    """Train a small LoRA on packaged pictures and draw before/after images: offline, on the CPU."""
    with quick_imports("demo"):
        from sd3tune.commands.demo import run_demo

    run_demo(out)


@app.command()
def train(
    config: ConfigArgument,
    overrides: Overrides = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes to train with, one per GPU.")] = 1,
    restarts: Annotated[
        int, typer.Option(min=0, metavar="N", help="How often to continue after a process died; with --num-processes.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the last checkpoint, if any.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and print the plan, without training.")
    ] = False,
) -> None:
    """Train a run."""
    if restarts and num_processes == 1:
        raise ConfigError(f"--restarts {restarts}: only for several processes; give --num-processes, too")
    loaded = load_config(config, overrides or ())
    grow_segments(os.environ)  # before torch is imported, and for the processes that are launched
    if num_processes > 1:
        from sd3tune.runtime.launch import relaunch

        relaunch(num_processes, sys.argv[1:], loaded.config.train.sharding, restarts)
    with quick_imports(f"train {config}"):
        from sd3tune.commands.train import run_training

    run_training(loaded.config, loaded.notes, resume=resume, dry_run=dry_run)


@app.command()
def plan(
    config: ConfigArgument,
    overrides: Overrides = None,
    card: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME", help="The GPU to plan for, such as RTX 4090, 3060 12GB, A100-80GB, 4070 laptop or T4."
        ),
    ] = None,
    memory: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(metavar="GB", help="Memory to fit into, instead of the GPU's."),
    ] = None,
    utilisation: Annotated[
        float, typer.Option(metavar="PERCENT", help="Assumed share of the GPU's peak throughput.")
    ] = 40,
    num_processes: Annotated[int, typer.Option(min=1, help="Processes to train with, one per GPU.")] = 1,
) -> None:
    """Forecast memory, disk space and time, and what each change would save; needs no weights."""
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--memory {memory:g}: give the card's memory in GB, such as 24")
    if not 0 < utilisation <= 100:
        raise ConfigError(f"--utilisation {utilisation:g}: give a percentage of the card's peak, above 0, at most 100")
    loaded = load_config(config, overrides or ())
    print_notes(loaded.notes)
    with quick_imports(f"plan {config}"):
        from sd3tune.commands.plan import plan_lines

    for line in plan_lines(loaded.config, card, memory, utilisation, num_processes):
        result(line)


@config_app.command()
def show(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Print the whole configuration, with defaults and overrides."""
    loaded = load_config(config, overrides or ())
    print_notes(loaded.notes)
    utf8 = (sys.stdout.encoding or "utf-8").lower().replace("-", "") == "utf8"  # configurations are read as UTF-8
    result(*dump_config(loaded.config, ascii_only=not utf8).rstrip("\n").split("\n"))


@config_app.command()
def check(config: ConfigArgument, overrides: Overrides = None) -> None:
    """Check a configuration; exit code 2 and one line per problem if there are any."""
    loaded = load_config(config, overrides or ())
    print_notes(loaded.notes)
    train = loaded.config.train
    length = f"{train.steps} step" if train.epochs is None else f"{train.epochs:g} epoch"
    result(f"{config}: valid, run {loaded.config.name!r}, {length}{'s' * (1 not in (train.steps, train.epochs))}")


@config_app.command()
def schema() -> None:
    """Print the JSON Schema, for editors."""
    result(*json.dumps(json_schema(), indent=2).split("\n"))


@config_app.command("list")
def list_presets() -> None:
    """List the shipped configurations, for `config new --from` and `extends: preset:NAME`."""
    from sd3tune.config.presets import all_presets, presets_folder

    presets = all_presets()
    width = max(len(preset.name) for preset in presets)
    for preset in presets:
        result(f"{preset.name:<{width}}  {preset.description}")
    result("", presets_folder())


@config_app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run and of its folder.")],
    preset: Annotated[
        str,
        typer.Option(
            "--from", metavar="PRESET", help="The shipped configuration to start from.", autocompletion=complete_preset
        ),
    ] = "dreambooth_sd35_medium",
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder of your images."),
    ] = None,
    caption: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Caption for images without their own."),
    ] = None,
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="File to write; by default NAME.yaml."),
    ] = None,
) -> None:
    """Write a commented configuration, ready to run."""
    from sd3tune.commands.config_new import new_config

    new_config(name, preset, data, caption, out)


@app.command()
def doctor() -> None:
    """Check versions, devices, logins and disks, and print problems. Exit code 2: nothing can run."""
    from sd3tune.commands.doctor import run_doctor

    run_doctor()


@base_app.command()
def path(
    name: Annotated[str, typer.Argument(help="nano, nano-1, tiny, tiny-sd3, tiny-sd35-medium or tiny-sd35-large.")],
) -> None:
    """Print the diffusers folder of an offline base, built on first use."""
    from sd3tune.commands.base_path import base_path

    result(base_path(name))


def _version(wanted: bool) -> None:
    if wanted:
        result(f"sd3tune {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Fine-tune Stable Diffusion 3 and 3.5 with LoRA."""


def main() -> None:
    """Entry point of the console script."""
    spin_briefly()
    exit_fast(run)


def run() -> None:
    """Run the command in `sys.argv`. Raises SystemExit with a nonzero exit code; returns for 0."""
    reporter, arguments = take_reporter(sys.argv[1:])
    with using(reporter):
        run_app(app, arguments)
