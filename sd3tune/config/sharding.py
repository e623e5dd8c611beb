"""What `train.sharding` cannot be combined with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sd3tune.config.sections.masks import any_keeps_base

if TYPE_CHECKING:
    from sd3tune.config.schema import Config


def sharding_problem(config: Config) -> str | None:
    """Return the first key that does not fit `train.sharding`, with the way out; None if all fit."""
    train = config.train
    if train.sharding == "none":
        return None
    if train.sharding != "fsdp":
        return (
            f"train.sharding is {train.sharding}: sd3tune does not train with DeepSpeed; set train.sharding=fsdp, "
            "which also divides parameters, gradients and optimizer state among the processes"
        )
    reason = next(_reasons(config), None)
    return None if reason is None else f"train.sharding is {train.sharding} and {reason}"


def _reasons(config: Config) -> Iterator[str]:
    train, method = config.train, config.method
    out = "or leave train.sharding out"
    if config.model.quantize != "none":
        form = config.model.quantize
        yield f"model.quantize is {form}: quantised blocks are not divided; set model.quantize=none, {out}"
    if train.compile != "none":
        yield f"train.compile is {train.compile}: compiled blocks are not gathered; set train.compile=none, {out}"
    if train.swap_blocks is not None:
        yield (
            f"train.swap_blocks is {train.swap_blocks}: a block is either swapped or divided; leave train.swap_blocks "
            f"out, {out}"
        )
    if train.fused_backward:
        yield f"train.fused_backward is true: it updates whole weights; leave train.fused_backward out, {out}"
    if train.memory is not None:
        yield f"train.memory is {train.memory}: it fits a run to one device; leave train.memory out, {out}"
    if getattr(method, "rank", None) == "auto":
        yield f"method.rank is auto: ranks are chosen with a whole base; set a number as method.rank, {out}"
    if config.eval is not None:
        yield (
            f"eval is on: one process draws its pictures, without the others' blocks; set eval=null and run `sd3tune "
            f"eval` afterwards, {out}"
        )
    if not method.freezes_base:
        yield from _reasons_of_whole_models(config, out)


def _reasons_of_whole_models(config: Config, out: str) -> Iterator[str]:
    """Yield what does not fit a method that trains the divided parameters themselves."""
    kind = f"method.kind is {config.method.kind}"
    if not config.optimizer.updates_in_shards:
        yield (
            f"optimizer.kind is {config.optimizer.kind}, whose update of a weight depends on others: with {kind} set "
            f"optimizer.kind=adamw or lion, {out}"
        )
    if config.data.own_predictions or any_keeps_base(config.data.sources):
        what = "a prior that preserves the base's own prediction" if config.data.own_predictions else "outside_target"
        yield (
            f"data.sources have {what}, which with {kind} needs a second, whole base; remove it, set "
            f"method.kind=lora, {out}"
        )
