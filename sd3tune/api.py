"""The functions of `import sd3tune`: each works like the command of the same name, but raises instead of exiting."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd3tune.config import Config
from sd3tune.config import load_config as load
from sd3tune.errors import Interrupted
from sd3tune.reporting import say

if TYPE_CHECKING:
    from sd3tune.commands.plan import RunPlan
    from sd3tune.evaluation.report import Evaluation
    from sd3tune.run.finished import Run
    from sd3tune.training.loop import Callback


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides such as `"train.steps=500"`, and return the checked configuration.

    Paths in the file are relative to it, those in overrides to the working directory. Raises ConfigError.
    """
    loaded = load(path, overrides)
    say(*(f"note: {note}" for note in loaded.notes), aside=True)
    return loaded.config


def plan(
    config: Config,
    *,
    card: str | None = None,
    memory: float | None = None,
    utilisation: float = 40,
    num_processes: int = 1,
) -> RunPlan:
    """Forecast a run's memory, disk space and time, and the savings of each configuration change. Needs no weights.

    `card` is a GPU such as `"4090"`; `memory` replaces its memory, in GB (10^9 bytes); `utilisation` is the assumed
    share of its peak throughput, in per cent. With several processes, memory and time are those of each. Raises
    UserError.
    """
    from sd3tune.commands.plan import make_run_plan

    return make_run_plan(config, card, memory, utilisation, num_processes)


def train(
    config: Config, *, resume: bool = False, callbacks: Sequence[Callback] = (), handle_signals: bool = False
) -> Run:
    """Train, and return the run.

    `resume` continues from the last checkpoint, if there is one. Each of `callbacks` is called with a `View` before the
    first step and after each step; an exception in it ends the run. With `handle_signals`, the first Ctrl-C or SIGTERM
    finishes the current step; without, Python's KeyboardInterrupt ends the step. Either way the last whole step is
    saved, and Interrupted is raised. Raises UserError.
    """
    from sd3tune.commands.train import carry_out_run
    from sd3tune.run.finished import Run
    from sd3tune.runtime.processes import closing_process_group, explain_timeout
    from sd3tune.runtime.signals import StopSignals

    run = Run(Path(str(config.output_dir)))
    try:
        with closing_process_group(), explain_timeout(config.train.process_timeout):
            if handle_signals:
                with StopSignals() as signals:
                    carry_out_run(config, resume=resume, callbacks=callbacks, signals=signals)
            else:
                carry_out_run(config, resume=resume, callbacks=callbacks)
    except KeyboardInterrupt:
        raise Interrupted(f"{run}: stopped; every file that was written is complete; train again") from None
    return run


def evaluate(
    target: str | os.PathLike[str],
    *,
    checkpoints: str = "last",
    prompts: str | os.PathLike[str] | None = None,
    protocol: str = "default",
    kind: str | None = None,
    class_word: str | None = None,
    seeds: int = 4,
    photos: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] | None = None,
    base: str | None = None,
    steps: int | None = None,
    size: str | tuple[int, int] | None = None,
    batch: int = 1,
    encoders: Mapping[str, str] | None = None,
) -> Evaluation:
    """Draw and measure a run, an adapter or a folder of pictures, as `sd3tune eval` does, and return the result.

    Pictures that are in the folder `out` are not drawn again. `encoders` maps the name of an encoder to a local folder,
    to a Hub id, or to `"none"`. The result has `folder`, `rows`, `table`, `verdict` and `values`. Raises UserError.
    """
    from sd3tune.commands.eval import run_eval
    from sd3tune.evaluation.request import EvalRequest

    paths = {"prompts": prompts, "photos": photos, "out": out}
    request = EvalRequest(
        os.fspath(target),
        checkpoints=checkpoints,
        protocol=protocol,
        kind=kind,
        class_word=class_word,
        seeds=seeds,
        base=base,
        steps=steps,
        size=size,
        batch=batch,
        encoders=encoders or {},
        **{name: None if path is None else Path(path) for name, path in paths.items()},
    )
    evaluation = run_eval(request)
    assert evaluation is not None  # a program is the only process of its evaluation
    return evaluation
