"""The prompts that a run measures while it trains, and the subject that they ask for."""

from __future__ import annotations

from collections.abc import Sequence

from sd3tune.config import Config
from sd3tune.config.sections.data import DataConfig
from sd3tune.data.records import Record
from sd3tune.errors import ConfigError, UserError
from sd3tune.measures.encoders import encoders_for
from sd3tune.measures.prompts import Prompts, default_prompts, evenly, sort_prompts
from sd3tune.measures.subject import Subject, read_subject
from sd3tune.model.base.offline import NANO, offline_kind

MOST_PROMPTS = 8
"""Prompts of a measurement if none are given: few, as training waits for them."""


def subject_of(data: DataConfig, captions: Sequence[str], class_word: str | None) -> Subject:
    """Return the subject of a training: `captions` are those of its photos, and `class_word` overrides the prior's."""
    priors = [prompt for source in data.sources if source.prior for prompt in source.prior.prompts]
    named = captions or [source.caption for source in data.sources if source.caption]
    triggers = {data.trigger_of(number) for number in range(len(data.sources))}
    trigger = triggers.pop() if len(triggers) == 1 else data.trigger
    return read_subject(named, priors, trigger, class_word)


def evaluated_prompts(config: Config, records: Sequence[Record]) -> Prompts | None:
    """Return the prompts of `eval` for a run that trains on `records`; None if it is off.

    Raises ConfigError if there is no prompt to score, or for an unknown encoder.
    """
    settings = config.eval
    if settings is None:
        return None
    try:
        encoders_for("default", config.model.base, settings.encoders)
    except UserError as error:
        raise ConfigError(*(f"eval.encoders: {problem}" for problem in error.problems)) from None
    subject = subject_of(config.data, [record.caption for record in records], settings.class_word)
    asked: Sequence[str] = settings.prompts
    if not asked:
        asked = evenly(
            default_prompts(subject, config.preview.texts, offline_kind(config.model.base) == NANO), MOST_PROMPTS
        )
    if not asked:
        raise ConfigError("eval.prompts: the captions share no words, so no prompts can be made; list some")
    prompts = sort_prompts([(text, {}) for text in asked], subject)
    if not prompts.scored:
        raise ConfigError(
            f"eval.prompts: the training uses all of them, such as {prompts.left_out[0]!r}, and those are not scored; "
            "list others"
        )
    return prompts


def describe_evaluation(config: Config, prompts: Prompts | None) -> list[str]:
    """Return the lines on `eval`; empty if it is off."""
    if config.eval is None or prompts is None:
        return []
    count = (len(prompts.scored) + len(prompts.of_class)) * config.eval.seeds
    patience = config.eval.patience
    until = "" if patience is None else f", until {patience} in a row are no better"
    lines = [f"evaluate  {count} picture{'s' * (count != 1)} every {config.eval.every} steps{until}"]
    if not prompts.of_class:
        lines.append(
            "note: eval: no drift is measured, as no class prompt can be made: set eval.class_word, such as dog, and "
            "caption the photos with a name for the subject"
        )
    if prompts.left_out:
        named = ", ".join(map(repr, prompts.left_out[:3])) + ", ..." * (len(prompts.left_out) > 3)
        lines.append(f"note: eval: not scored, as the training uses them: {named}")
    return lines
