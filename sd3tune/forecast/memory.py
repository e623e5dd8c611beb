"""The memory line in the description of a run."""

from __future__ import annotations

from sd3tune.config.sections.outputs import PreviewConfig
from sd3tune.encode.report import megabytes
from sd3tune.forecast.rehearsal import rehearse_training
from sd3tune.run.preflight import Plan


def describe_memory(plan: Plan) -> str:
    """Return a line with the expected peak memory of training, without previews and encoding (see `sd3tune plan`)."""
    without_previews = plan.config.model_copy(update={"preview": PreviewConfig(), "eval": None})
    training = rehearse_training(without_previews, plan.base, plan.method, plan.largest, plan.dtype)
    return f"memory    about {megabytes(training.peak)} while training (`sd3tune plan` shows the rest)"
