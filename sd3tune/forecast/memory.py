"""The memory line of a run's description."""

from __future__ import annotations

from sd3tune.config.sections.outputs import PreviewConfig
from sd3tune.encode.report import megabytes
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.run.buckets import bucket_of
from sd3tune.run.preflight import Plan


def describe_memory(plan: Plan) -> str:
    """What training is expected to take, in a line; previews and encoding are left to `sd3tune plan`."""
    silent = plan.config.model_copy(update={"preview": PreviewConfig()})
    largest = max((bucket_of(record, plan.buckets) for record in plan.records), key=lambda size: size[0] * size[1])
    training = rehearse_training(silent, plan.base, plan.method, largest, plan.dtype)
    return f"memory    about {megabytes(training.peak)} while training (`sd3tune plan` shows the rest)"
