"""Description of a run's sigma distribution, computed by quadrature over u, without sampling."""

from __future__ import annotations

import torch

from sd3tune.config.sections.flow import FlowConfig
from sd3tune.flow.weighting import QUADRATURE_POINTS
from sd3tune.training.metrics import SIGMA_BINS
from sd3tune.training.objective import sigma_of_u

BARS = " ▁▂▃▄▅▆▇█"


def describe_sigmas(flow: FlowConfig, shift: float) -> str:
    """Return e.g. `logit_normal, shift 3: half of the samples above 0.75, 14 % above 0.9, 1 % below 0.1 |▁▂▄▆█|`.

    One bar per bin of `metrics.jsonl`; `shift` is the effective one.
    """
    u = (torch.arange(QUADRATURE_POINTS, dtype=torch.float64) + 0.5) / QUADRATURE_POINTS
    draw = sigma_of_u(flow, shift)
    sigma, median = draw(u), draw(torch.tensor(0.5, dtype=torch.float64)).item()
    shares = torch.histc(sigma, SIGMA_BINS, 0, 1) / len(sigma)
    bars = "".join(BARS[round(8 * share)] for share in (shares / shares.max()).tolist())
    bounds = f", from {flow.min_sigma:g} to {flow.max_sigma:g}" if (flow.min_sigma, flow.max_sigma) != (0, 1) else ""
    by_resolution = " by resolution" if flow.shift == "resolution" else ""
    return (
        f"{flow.timesteps.kind}, shift {shift:.3g}{by_resolution}{bounds}: half of the samples above "
        f"{median:.2g}, {_percent((sigma > 0.9).double().mean().item())} above 0.9, "
        f"{_percent((sigma < 0.1).double().mean().item())} below 0.1  |{bars}|"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share == 0 or share >= 0.005 else "under 1 %"
