"""The callbacks of a run, and the trackers that they report to. They do not affect training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from sd3tune.config.public import public_config
from sd3tune.config.sections.outputs import TrackingConfig
from sd3tune.reporting import say
from sd3tune.run.callbacks.base import RunCallback, Setup
from sd3tune.run.callbacks.previews import Previews
from sd3tune.run.callbacks.uploads import Uploads
from sd3tune.run.callbacks.validation import Validation
from sd3tune.run.encoding import Encoded
from sd3tune.run.folder import LOGS
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes
from sd3tune.tracking.base import Start
from sd3tune.tracking.trackers import Trackers

CALLBACKS: Sequence[type[RunCallback]] = (Validation, Previews, Uploads)
"""The package's callbacks, in the order in which they are called after a step."""

Kind = TypeVar("Kind", bound=RunCallback)


class RunCallbacks:
    """The callbacks of a run, as a context manager that closes them and the trackers."""

    def __init__(
        self,
        plan: Plan,
        encoded: Encoded,
        processes: Processes,
        contract: Mapping[str, Any],
        from_step: int,
        more: Sequence[type[RunCallback]] = (),
    ) -> None:
        """`more` are callbacks of rooms above this one."""
        config = plan.config
        start = Start(config.name, plan.run / LOGS, public_config(config))
        self.trackers = Trackers(config.tracking if processes.is_main else TrackingConfig(), start, say)
        setup = Setup(plan, encoded, processes, contract, self.trackers, from_step)
        self._kinds = (*CALLBACKS, *more)
        self.callbacks = [made for kind in self._kinds if (made := kind.make(setup))]

    def __enter__(self) -> RunCallbacks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.trackers.__exit__(kind, error, where)
        for callback in self.callbacks:
            callback.close(finished=kind is None)

    def find(self, kind: type[Kind]) -> Kind | None:
        """Return the callback of a class; None if this run has none."""
        return next((callback for callback in self.callbacks if isinstance(callback, kind)), None)

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in each callback, by its key in `run.json`; not part of the training time."""
        unused = {kind.timing: 0.0 for kind in self._kinds if kind.timing}
        spent = {callback.timing: callback.seconds for callback in self.callbacks if callback.timing}
        return {**unused, **spent, "tracking_s": self.trackers.seconds}

    def ended(self) -> bool:
        """Return True if a callback ends the run with the present step."""
        return any(callback.ended for callback in self.callbacks)

    @property
    def warnings(self) -> list[str]:
        return [*(line for callback in self.callbacks for line in callback.warnings), *self.trackers.warnings]

    def report(self) -> dict[str, Any]:
        """Return the callbacks' measurements for the report in `run.json` and the card."""
        return {name: value for callback in self.callbacks for name, value in callback.report().items()}

    def summary(self) -> list[str]:
        """Return lines for the end of a run."""
        curves = [f"curves    {where}" for where in self.trackers.where()]
        return [*curves, *(line for callback in self.callbacks for line in callback.summary())]
