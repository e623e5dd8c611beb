"""Loading of a pretrained model, which is freed at the end."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

from sd3tune.errors import ModelError
from sd3tune.model.base.pretrained import ModelSource, quiet_transformers
from sd3tune.reporting import loading
from sd3tune.runtime.out_of_memory import is_out_of_memory

ONLY_HERE: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
"""Options of each `from_pretrained`."""


class HoldsModel(Protocol):
    """A model with what belongs to it."""

    model: Any


Held = TypeVar("Held", bound=HoldsModel)


@contextmanager
def loaded(source: ModelSource, device: torch.device, load: Callable[[], Held]) -> Iterator[Held]:
    """Call `load`, and free the model's weights at the end, even if the caller keeps the result.

    Raises ModelError, in one line with the way out, for a model that cannot be loaded.
    """
    try:
        with loading(f"loading {source.label}"), quiet_transformers():
            held = load()
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{source.label}: cannot be loaded: {type(error).__name__}: {reason}; name another model with --model"
        ) from error
    try:
        yield held
    finally:
        held.model = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def checked(source: ModelSource, model: Any, info: dict[str, Any], device: torch.device) -> Any:
    """Return a model on the device, for inference. Raises ModelError for a missing tensor, which would be random."""
    if info["missing_keys"]:
        raise ModelError(f"{source.label}: tensor {min(info['missing_keys'])} is missing in its weights")
    return model.to(device).eval().requires_grad_(False)
