"""The options of `sd3tune eval` and `sd3tune.evaluate`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sd3tune.errors import ConfigError

CHECKPOINTS = ("last", "all")
PROTOCOLS = ("default", "dreambooth")
KINDS = ("object", "live")
MOST_SEEDS = 1000


@dataclass(frozen=True)
class EvalRequest:
    """One evaluation. A field that is None is filled in from the run."""

    target: str
    """A run, an adapter (file, folder or Hub repository), a whole model, or a folder of pictures."""
    checkpoints: str = "last"
    """`last`: the final weights. `all`: every weights that the run folder holds."""
    prompts: Path | None = None
    """A prompt file as `infer` reads it; None: prompts for the run's subject."""
    protocol: str = "default"
    kind: str | None = None
    """The kind of subject, which chooses the prompts of the DreamBooth protocol; None: as the class has it."""
    class_word: str | None = None
    """The class of the subject, such as `dog`; None: as the run's prior names it."""
    seeds: int = 4
    """Pictures of each prompt."""
    photos: Path | None = None
    """The folder of photos to compare with; None: the photos that the run was trained on."""
    out: Path | None = None
    """The folder for pictures and figures; None: `eval` in the run folder, else `eval/NAME`."""
    base: str | None = None
    steps: int | None = None
    size: str | tuple[int, int] | None = None
    batch: int = 1
    """Pictures that are drawn at once."""
    encoders: Mapping[str, str] = field(default_factory=dict)
    """Encoder name -> local folder that replaces its Hub repository."""

    def check(self) -> None:
        """Raise ConfigError with a line for each value that is not possible."""
        problems = [
            *_one_of("--checkpoints", self.checkpoints, CHECKPOINTS),
            *_one_of("--protocol", self.protocol, PROTOCOLS),
            *(_one_of("--kind", self.kind, KINDS) if self.kind is not None else []),
        ]
        if not 1 <= self.seeds <= MOST_SEEDS:
            problems.append(f"--seeds {self.seeds}: the number of pictures for each prompt, from 1 to {MOST_SEEDS}")
        if self.prompts is not None and self.protocol != "default":
            problems.append(f"--prompts: not with --protocol {self.protocol}, which has its own; leave one of them out")
        if self.class_word is not None and not self.class_word.strip():
            problems.append("--class: is blank; give the subject's class, such as dog, or leave it out")
        if problems:
            raise ConfigError(*problems)


def read_encoders(texts: Sequence[str]) -> dict[str, str]:
    """Return the encoders of `NAME=FOLDER` texts. Raises ConfigError."""
    encoders = {}
    for text in texts:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise ConfigError(f"--encoder {text}: write NAME=FOLDER, such as dinov2=./dinov2-base")
        encoders[name] = folder
    return encoders


def _one_of(flag: str, value: str, allowed: Sequence[str]) -> list[str]:
    if value in allowed:
        return []
    close = difflib.get_close_matches(value, allowed, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(allowed)}"
    return [f"{flag} {value}: {hint}"]
