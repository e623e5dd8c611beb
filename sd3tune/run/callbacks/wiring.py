"""The callbacks of a run: held-out loss, previews, trackers and uploads. They do not affect training."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from sd3tune.config.public import public_config
from sd3tune.config.sections.outputs import TrackingConfig
from sd3tune.publish.repository import repository_of
from sd3tune.reporting import say
from sd3tune.run.callbacks.previews import Previews
from sd3tune.run.callbacks.uploads import Uploads
from sd3tune.run.callbacks.validation import Validation
from sd3tune.run.encoding import Encoded
from sd3tune.run.folder import LOGS
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes
from sd3tune.tracking.base import Start
from sd3tune.tracking.trackers import Trackers
from sd3tune.training.loop import Callback


class RunCallbacks:
    """The callbacks of a run, as a context manager that closes trackers and uploads."""

    def __init__(
        self, plan: Plan, encoded: Encoded, processes: Processes, contract: Mapping[str, Any], from_step: int
    ) -> None:
        config = plan.config
        start = Start(config.name, plan.run / LOGS, public_config(config))
        self.trackers = Trackers(config.tracking if processes.is_main else TrackingConfig(), start, say)
        self.previews = Previews(plan, encoded, processes, self.trackers) if config.preview.prompts else None
        self.validation = (
            Validation(plan, encoded, processes, contract, self.trackers, from_step) if encoded.holdout else None
        )
        repository = repository_of(config.hub) if config.hub.push == "checkpoint" and processes.is_main else None
        self.uploads = Uploads(plan, repository, contract) if repository else None

    def __enter__(self) -> RunCallbacks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.trackers.__exit__(kind, error, where)
        if self.uploads:
            self.uploads.close(finished=kind is None)

    @property
    def callbacks(self) -> list[Callback]:
        return [callback for callback in (self.validation, self.previews, self.uploads) if callback]

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each callback, by its key in `run.json`; not part of the training time."""
        return {
            "validation_s": self.validation.seconds if self.validation else 0.0,
            "preview_s": self.previews.seconds if self.previews else 0.0,
            "tracking_s": self.trackers.seconds,
        }

    @property
    def warnings(self) -> list[str]:
        skipped = self.previews.skipped if self.previews else []
        uploads = self.uploads.warnings if self.uploads else []
        return [*(f"step {step}: no preview, out of memory" for step in skipped), *self.trackers.warnings, *uploads]

    def report(self) -> dict[str, Any]:
        """Return the held-out measurements for the report in `run.json` and the card."""
        return self.validation.report() if self.validation else {}

    def summary(self) -> list[str]:
        """Return lines for the end of a run."""
        curves = [f"curves    {where}" for where in self.trackers.where()]
        return [*curves, *(self.validation.summary() if self.validation else [])]
