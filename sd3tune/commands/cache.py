"""`sd3tune cache`: only encode captions and images, so that training starts immediately."""

from __future__ import annotations

from collections.abc import Sequence

from sd3tune import reporting
from sd3tune.config import Config
from sd3tune.errors import ConfigError
from sd3tune.forecast.fitting import fitted_plan
from sd3tune.run.encoding import encode
from sd3tune.run.places import store_folder
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.device import make_accelerator
from sd3tune.runtime.processes import closing_process_group, explain_timeout, processes_of


def run_cache(config: Config, notes: Sequence[str] = ()) -> None:
    """Encode the captions and images of `config` into its store. Raises UserError."""
    timeout = config.train.process_timeout
    with closing_process_group(), explain_timeout(timeout):
        accelerator = make_accelerator(timeout_minutes=timeout)
        processes = processes_of(accelerator)

        def say(line: str) -> None:
            if processes.is_main:
                reporting.say(line)

        for note in notes:
            say(f"note: {note}")
        if config.data.streams:
            raise ConfigError("data.sources: a stream is encoded while training; `sd3tune train` needs no cache of it")
        with accelerator.main_process_first():
            plan = make_plan(config, accelerator.device, resume=None, world=processes.world)
        plan, chosen = fitted_plan(plan, processes)
        for line in chosen:
            say(line)
        encode(plan, processes, say)
        if processes.is_main:
            reporting.result(f"store     {store_folder(config)}", store=store_folder(config))
