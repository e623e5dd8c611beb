"""What a card speaks of: a run, or one of its checkpoints, as its folder describes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3tune.config import Config
from sd3tune.model.base.contract import sampling_of


@dataclass(frozen=True)
class Drawing:
    """The settings of a picture, besides the weights."""

    prompt: str
    steps: int
    guidance: float
    seed: int = 0


@dataclass(frozen=True)
class Sample:
    """A picture that lies in the repository beside the card."""

    file: str
    """Relative to the repository."""
    step: int
    """Whose weights drew it."""
    drawing: Drawing


@dataclass(frozen=True)
class Trained:
    """The facts of a finished run, read from the run folder only."""

    config: Config
    contract: Mapping[str, Any]
    """The contract of the adapter or model."""
    run_facts: Mapping[str, Any]
    """As in `run.json`; of a run that goes on, without timings and report."""
    samples: Sequence[Sample] = ()
    """The last of each prompt."""
    sheet: str | None = None
    """The picture of all samples by step, relative to the repository."""
    repo_id: str | None = None
    """Where the card lies on the Hub; None speaks of the folder that it lies in."""
    step: int | None = None
    """Of a checkpoint of a run that goes on; None when it has ended."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter, rather than a whole model."""
        return "rank" in self.contract

    @property
    def from_scratch(self) -> bool:
        return self.contract.get("init") == "random"

    @property
    def uses_t5(self) -> bool:
        return "t5" in self.contract["encoders"]

    @property
    def t5_lengths(self) -> list[int]:
        """In tokens, ascending: all that were trained at."""
        return self.contract.get("t5_lengths", [self.contract["max_sequence_length"]])

    @property
    def encoder_files(self) -> list[str]:
        """Names of the files that text encoders came from, where they are not the base's own."""
        return [used["file"] for used in self.contract.get("encoder_files", {}).values()]

    @property
    def base_is_local(self) -> bool:
        """Whether the base, or a part of it, is a file or folder of the machine that it was trained on."""
        return self.contract["base_kind"] in ("folder", "file") or bool(self.encoder_files)

    @property
    def report(self) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.run_facts.get("report")
        return found

    @property
    def steps(self) -> int:
        return self.config.train.total_steps if self.step is None else self.step

    @property
    def drew_first_sample(self) -> bool:
        """Whether the first sample was drawn by these very weights."""
        return bool(self.samples) and self.samples[0].step == self.steps

    @property
    def drawing(self) -> Drawing:
        """One to begin with: the first sample, else of the one caption, the trigger, or whatever there is."""
        if self.samples:
            return self.samples[0].drawing
        return self.default_drawing(self.contract["instance_prompt"] or self.contract["trigger"] or "a photo")

    def default_drawing(self, prompt: str) -> Drawing:
        """Return what `sd3tune infer` draws when it is told the prompt alone."""
        return Drawing(prompt, **sampling_of(self.contract))
