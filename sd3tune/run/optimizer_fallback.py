"""Test of the configured optimizer on this machine, with a fallback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from sd3tune.config.sections.optimizer import OptimizerSection
from sd3tune.run.preflight import OptimizerFallback, Plan
from sd3tune.runtime.processes import Processes
from sd3tune.training.optimizers import OPTIMIZERS, make_optimizer

PROBED = 1000
"""Number of parameters in the probe: a few blocks of 8-bit moments, with the last block partly filled."""


def with_working_optimizer(plan: Plan, processes: Processes, say: Callable[[str], None]) -> Plan:
    """Return the plan, with the fallback of its optimizer (see `OptimizerKind`) if that fails in any process.

    All processes use the same optimizer.
    """
    asked = plan.config.optimizer
    fallback = OPTIMIZERS[asked.kind].fallback
    if fallback is None:
        return plan
    reason = _probe(type(asked)(), plan.device)
    failed = processes.gather(torch.tensor(float(reason is not None), device=plan.device)).reshape(-1).tolist()
    if not any(failed):
        return plan
    reason = reason or f"it failed in process {failed.index(1.0)}"
    used = fallback(**asked.model_dump(exclude={"kind"}))
    say(
        f"warning: optimizer.kind: {asked.kind} does not work here ({reason}); using {used.kind} with the same settings"
    )
    config = plan.config.model_copy(update={"optimizer": used})
    return replace(plan, config=config, optimizer_fallback=OptimizerFallback(asked.kind, reason))


def _probe(settings: OptimizerSection, device: torch.device) -> str | None:
    """Take two optimizer steps on the device, so that the second reads the first's state. Return the error, or None."""
    try:
        master = nn.Parameter(torch.zeros(PROBED, device=device))
        optimizer = make_optimizer(settings, master)
        optimizer.found_inf = torch.zeros((), device=device)  # type: ignore[attr-defined]
        master.grad = torch.linspace(0.5, 1.0, PROBED, device=device)
        for _ in range(2):
            optimizer.step()
        if not torch.allclose(master.detach(), torch.full_like(master, -2 * settings.lr), rtol=0.05, atol=0):
            return "its steps differ from AdamW's"
    except Exception as error:  # a library built for another device or driver can raise anything
        return " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return None
