"""The prompts of an evaluation: from a file, of the DreamBooth protocol, or made for the run's subject."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sd3tune.errors import ConfigError
from sd3tune.evaluation.request import EvalRequest
from sd3tune.inference.prompts_file import read_prompts
from sd3tune.measures.dreambooth import dreambooth
from sd3tune.measures.prompts import MOST_CLASS_PROMPTS, MOST_NANO_PROMPTS, Prompts, default_prompts, sort_prompts
from sd3tune.measures.subject import Subject


def choose_prompts(request: EvalRequest, subject: Subject, previews: Sequence[str], nano: bool) -> Prompts:
    """Return the prompts of an evaluation. Raises ConfigError if there is none.

    `previews` are the prompts of the run's previews. `nano` chooses default prompts of nano's world.
    """
    if request.prompts is not None:
        asked = _from_file(request.prompts)
    elif request.protocol == "dreambooth":
        asked = [(text, {}) for text in _of_dreambooth(request, subject)]
    else:
        asked = [(text, {}) for text in default_prompts(subject, previews, nano)]
    if not asked:
        raise ConfigError("the captions share no words, so no prompts can be made; give --prompts FILE")
    prompts = sort_prompts(asked, subject, MOST_NANO_PROMPTS if nano else MOST_CLASS_PROMPTS)
    if not prompts.scored:
        where = f"--prompts {request.prompts}: " if request.prompts else ""
        raise ConfigError(
            f"{where}every prompt is one that the training used, such as {prompts.left_out[0]!r}, and those are not "
            "scored; give others with --prompts FILE"
        )
    return prompts


def _from_file(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    found = list[tuple[str, Mapping[str, Any]]]()
    for line in read_prompts(path):
        values = dict(line.values)
        found.append((values.pop("prompt"), {key: value for key, value in values.items() if key != "name"}))
    return found


def _of_dreambooth(request: EvalRequest, subject: Subject) -> list[str]:
    if subject.phrase is None:
        raise ConfigError(
            "--protocol dreambooth: its prompts need the subject's name, and the captions share none; "
            "give --prompts FILE instead"
        )
    protocol = dreambooth()
    kind = request.kind or protocol.kind_of(subject.noun or subject.phrase)
    return protocol.prompts("live" if kind == "live" else "object", subject.phrase)
