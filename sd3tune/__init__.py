"""sd3tune: fine-tune Stable Diffusion 3 and 3.5 with LoRA and DreamBooth.

`__all__` is the public Python API, described in docs/python.md; everything else may change. Names are imported on first
use, so that `import sd3tune` is fast and does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd3tune import lora, reporting
    from sd3tune.api import evaluate, load_config, plan, train
    from sd3tune.commands.plan import RunPlan
    from sd3tune.config import Config
    from sd3tune.errors import (
        AdapterError,
        ConfigError,
        DataError,
        Interrupted,
        MeasureUnavailable,
        ModelError,
        ProcessError,
        RunError,
        UserError,
    )
    from sd3tune.evaluation.report import Evaluation
    from sd3tune.inference.generate import generate
    from sd3tune.run.finished import Run
    from sd3tune.training.loop import Callback, View

__version__ = "0.1.0"

__all__ = [
    "AdapterError",
    "Callback",
    "Config",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Interrupted",
    "MeasureUnavailable",
    "ModelError",
    "ProcessError",
    "Run",
    "RunError",
    "RunPlan",
    "UserError",
    "View",
    "__version__",
    "evaluate",
    "generate",
    "load_config",
    "lora",
    "plan",
    "reporting",
    "train",
]

_MODULES = {
    "sd3tune.api": ("evaluate", "load_config", "plan", "train"),
    "sd3tune.commands.plan": ("RunPlan",),
    "sd3tune.config": ("Config",),
    "sd3tune.errors": (
        *("AdapterError", "ConfigError", "DataError", "Interrupted"),
        *("MeasureUnavailable", "ModelError", "ProcessError", "RunError", "UserError"),
    ),
    "sd3tune.evaluation.report": ("Evaluation",),
    "sd3tune.inference.generate": ("generate",),
    "sd3tune.run.finished": ("Run",),
    "sd3tune.training.loop": ("Callback", "View"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in ("lora", "reporting"):
        return importlib.import_module(f"sd3tune.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sd3tune' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
