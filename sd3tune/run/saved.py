"""What a checkpoint says about the run that it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sd3tune.config import Config
from sd3tune.errors import RunError
from sd3tune.model.base.offline import name_of_version
from sd3tune.training.checkpoint import read_state


def saved_identity(checkpoint: Path) -> dict[str, Any]:
    """Return the identity in a checkpoint. Raises RunError if it was edited or damaged."""
    identity: dict[str, Any] = read_state(checkpoint)["identity"]
    if not isinstance(identity.get("data"), dict):
        raise RunError(
            f"{checkpoint}: damaged (identity has no data); delete this folder to resume from the one before"
        )
    return identity


def with_saved_base(config: Config, checkpoint: Path) -> Config:
    """Return the configuration of a resumed run with the version of its base that the run began with."""
    model = saved_identity(checkpoint).get("model")
    fingerprint = model.get("base") if isinstance(model, dict) else None
    name = name_of_version(config.model.base, fingerprint)
    return config.model_copy(update={"model": config.model.model_copy(update={"base": name})})
