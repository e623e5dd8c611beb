"""Checkpoints of the trainings here: one file, replaced at intervals and removed at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from sd3tune.files.atomic import new_file

EVERY = 100  # steps


class _Stateful(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> object: ...


class Checkpoint:
    """The state of a training in a file: its parts, the number of finished steps, and the CPU's random state."""

    def __init__(self, path: Path | None, **parts: _Stateful) -> None:
        """Use the file at `path`; None keeps nothing."""
        self._path, self._parts = path, parts

    def load(self) -> int:
        """Restore the parts, and return the number of finished steps; 0 if there is no file."""
        if self._path is None or not self._path.is_file():
            return 0
        state = torch.load(self._path, weights_only=True)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        torch.set_rng_state(state["random"])
        finished: int = state["finished"]
        print(f"{self._path}: continues after step {finished}", flush=True)
        return finished

    def save(self, finished: int) -> None:
        """Write the file after every `EVERY`th step."""
        if self._path is None or finished % EVERY:
            return
        state = {name: part.state_dict() for name, part in self._parts.items()}
        with new_file(self._path) as temporary, temporary.open("wb") as file:
            torch.save({**state, "finished": finished, "random": torch.get_rng_state()}, file)
