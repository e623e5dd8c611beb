"""Steps and guidance of a run's previews: those that are written, else those of the base's contract."""

from __future__ import annotations

from typing import Any

from sd3tune.config import Config
from sd3tune.model.base.base import Base
from sd3tune.model.base.contract import sampling_of

_STATED = {"steps": "sampling_steps", "guidance": "guidance"}
"""Key of `preview` -> key of a contract."""


def with_base_sampling(config: Config, base: Base) -> Config:
    """Return the configuration with the base's steps and guidance in `preview`, where the keys are not written.

    Only bases that sd3tune wrote state any, such as `nano`. Guidance of 1 or less is not taken if a prompt has `slg`.
    """
    preview, taken = config.preview, _stated(base)
    if taken.get("guidance", 2) <= 1 and any(picture.slg is not None for picture in preview.pictures):
        del taken["guidance"]
    taken = {key: value for key, value in taken.items() if key not in preview.model_fields_set}
    return config.model_copy(update={"preview": preview.model_copy(update=taken)}) if taken else config


def describe_base_sampling(config: Config, base: Base) -> list[str]:
    """Return a line about the steps and guidance that are the base's."""
    own = {key: value for key, value in _stated(base).items() if getattr(config.preview, key) == value}
    words = [{"steps": f"{value} steps", "guidance": f"guidance {value:g}"}[key] for key, value in own.items()]
    return [f"sampling  {' and '.join(words)}, as {base.label} states, in previews and `infer`"] if own else []


def _stated(base: Base) -> dict[str, Any]:
    """Return the settings in a base's contract; none of random weights, which are trained from scratch."""
    contract = {} if base.random else base.contract
    return {key: value for key, value in sampling_of(contract).items() if _STATED[key] in contract}
