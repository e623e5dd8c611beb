"""The subject of a card: a run, or one of its checkpoints, as described by its folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sd3tune.adapter.embedding import names_of
from sd3tune.config import Config
from sd3tune.model.base.contract import sampling_of


@dataclass(frozen=True)
class Drawing:
    """The settings of a picture, besides the weights."""

    prompt: str
    steps: int
    guidance: float
    seed: int = 0
    negative: str = ""
    size: Sequence[int] | None = None
    """(width, height); None for the size of the training."""
    slg: Mapping[str, Any] | None = None
    """Skip-layer guidance: `scale`, `layers`, `start` and `stop`."""


@dataclass(frozen=True)
class Sample:
    """A picture that lies in the repository beside the card."""

    file: str
    """Path relative to the repository."""
    step: int
    """Step of the weights that drew it."""
    drawing: Drawing


@dataclass(frozen=True)
class Trained:
    """The facts of a run, read from the run folder only."""

    config: Config
    contract: Mapping[str, Any]
    """The contract of the adapter or model."""
    run_facts: Mapping[str, Any]
    """Content of `run.json`; of an unfinished run, without timings and report."""
    samples: Sequence[Sample] = ()
    """The last sample of each prompt."""
    sheet: str | None = None
    """Contact sheet of samples by step, relative to the repository."""
    repo_id: str | None = None
    """The card's repository on the Hub; None for a card in a local folder."""
    step: int | None = None
    """Step of a checkpoint of an unfinished run; None for a finished run."""
    evaluation: Mapping[str, Any] | None = None
    """Content of `eval/eval.json`; None without one."""

    @property
    def is_adapter(self) -> bool:
        """True for an adapter, False for a whole model."""
        return "rank" in self.contract

    @property
    def kind_of_adapter(self) -> str:
        """`LoRA`, `DoRA`, `LoHa` or `LoKr`; methods from outside the package count as LoRA."""
        return {"dora": "DoRA", "loha": "LoHa", "lokr": "LoKr"}.get(self.contract.get("method", ""), "LoRA")

    @property
    def is_embedding(self) -> bool:
        """True for the embedding of a learned token, without an adapter."""
        return "token" in self.contract

    @property
    def learned(self) -> Mapping[str, Any] | None:
        """The settings of a learned token, with an adapter or without; None without one."""
        found: Mapping[str, Any] | None = self.contract if self.is_embedding else self.contract.get("embedding")
        return found

    @property
    def is_for_a_base(self) -> bool:
        """True for a product that is used together with its base."""
        return self.is_adapter or self.is_embedding

    @property
    def folder(self) -> str:
        """Folder of the product in the repository."""
        return "adapter" if self.is_adapter else "embedding" if self.is_embedding else "model"

    @property
    def token_names(self) -> list[str]:
        """The names of a learned token's vectors; empty without one."""
        return names_of(self.learned["token"], self.learned["vectors"]) if self.learned else []

    @property
    def from_scratch(self) -> bool:
        return self.contract.get("init") == "random"

    @property
    def uses_t5(self) -> bool:
        return "t5" in self.contract["encoders"]

    @property
    def t5_lengths(self) -> list[int]:
        """All trained T5 lengths in tokens, ascending."""
        return self.contract.get("t5_lengths", [self.contract["max_sequence_length"]])

    @property
    def encoder_files(self) -> list[str]:
        """Names of the separate files that text encoders were loaded from."""
        return [used["file"] for used in self.contract.get("encoder_files", {}).values()]

    @property
    def trained_encoders(self) -> Mapping[str, Mapping[str, Any]]:
        """Text encoder -> settings of its adapter, for the trained ones."""
        return {name: of for name, of in (self.contract.get("text_encoders") or {}).items() if of}

    @property
    def base_is_local(self) -> bool:
        """True if the base, or a part of it, is a local file or folder of the training machine."""
        return self.contract["base_kind"] in ("folder", "file") or bool(self.encoder_files)

    @property
    def report(self) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.run_facts.get("report")
        return found

    @property
    def steps(self) -> int:
        early = self.run_facts.get("stopped_early")
        last: int = early["step"] if early else self.config.train.total_steps
        return last if self.step is None else self.step

    @property
    def drew_first_sample(self) -> bool:
        """True if these weights drew the first sample."""
        return bool(self.samples) and self.samples[0].step == self.steps

    @property
    def drawing(self) -> Drawing:
        """Settings of an example: the first sample's, or defaults for the single caption, the trigger or `a photo`."""
        if self.samples:
            return self.samples[0].drawing
        of_concepts = (concept["trigger"] for concept in self.contract.get("concepts", []) if concept["trigger"])
        trigger = next(of_concepts, self.contract["trigger"])
        return self.default_drawing(self.contract["instance_prompt"] or trigger or "a photo")

    def default_drawing(self, prompt: str) -> Drawing:
        """Return the settings of `sd3tune infer` for a prompt without other options."""
        return Drawing(prompt, **sampling_of(self.contract))
