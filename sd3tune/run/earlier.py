"""Runs that earlier versions began: they continue with their original maths, as far as it still exists."""

from __future__ import annotations

from sd3tune.config import Config
from sd3tune.run.preflight import Plan
from sd3tune.run.saved import saved_identity


def drops_kept_captions(plan: Plan) -> bool:
    """Return whether caption and encoder dropout also act on samples that keep the base's own prediction."""
    if plan.start is None or not may_drop_kept(plan.config):
        return False
    return "kept_captions" not in saved_identity(plan.start)["data"]


def may_drop_kept(config: Config) -> bool:
    """Return whether captions or encoders can be dropped for samples that keep the base's own prediction."""
    data = config.data
    return bool(data.own_predictions) and (data.caption_dropout > 0 or data.encoder_dropout > 0)


def began_in_llm_int8(plan: Plan) -> bool:
    """Return whether the run began with layers in LLM.int8(), which also rounded activations.

    They are replaced by layers that round weights only. T5's stored embeddings stay in use.
    """
    if plan.start is None or "int8" not in plan.config.model.fewer_bits.values():
        return False
    saved = saved_identity(plan.start).get("model", {})
    return "int8" in (saved.get("quantize"), saved.get("t5_quantize")) and "int8" not in saved
