"""The functions of `import sd3tune`: each works like the command of the same name, but raises instead of exiting."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sd3tune.config import Config
from sd3tune.config import load_config as load
from sd3tune.errors import Interrupted
from sd3tune.reporting import say

if TYPE_CHECKING:
    from sd3tune.commands.plan import RunPlan
    from sd3tune.run.finished import Run
    from sd3tune.training.loop import Callback


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides such as `"train.steps=500"`, and return the checked configuration.

    Paths in the file are relative to it, those in overrides to the working directory. Raises ConfigError.
    """
    loaded = load(path, overrides)
    say(*(f"note: {note}" for note in loaded.notes), aside=True)
    return loaded.config


def plan(config: Config, *, card: str | None = None, memory: float | None = None, utilisation: float = 40) -> RunPlan:
    """Forecast a run's memory, disk space and time, and the savings of each configuration change. Needs no weights.

    `card` is a GPU such as `"4090"`; `memory` replaces its memory, in GB (10^9 bytes); `utilisation` is the assumed
    share of its peak throughput, in per cent. Raises UserError.
    """
    from sd3tune.commands.plan import make_run_plan

    return make_run_plan(config, card, memory, utilisation)


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
