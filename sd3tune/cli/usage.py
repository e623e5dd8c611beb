"""What was typed wrong, in one line that says what to type."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from sd3tune.config.shape import all_fields
from sd3tune.reporting import say

UsageError: Any = typer.BadParameter.__mro__[2]
"""Click's ClickException; typer brings a click of its own, or in older versions the installed one."""


def usage_problem(error: Any) -> str | None:
    """The line for a usage error of typer; None for a command without arguments, whose help is printed instead."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        say(*error.message.split("\n") if error.message else ())  # empty with rich, which has printed it already
        return None
    option = getattr(error, "option_name", None)
    takes_overrides = context is not None and any(parameter.name == "overrides" for parameter in context.command.params)
    if option is not None and takes_overrides:
        key, value = _key_of(option), _value_of(option, sys.argv)
        if key is not None:
            return f"{option}: settings are written as key=value; write {key}={value}"
    message = " ".join(error.format_message().split()).rstrip(".")
    command = "sd3tune" if context is None else context.command_path
    return f"{message[:1].lower()}{message[1:]}; see `{command} --help`"


def _key_of(option: str) -> str | None:
    """The key that an option such as `--steps`, `--train.steps` or `--train-batch-size` means."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    keys = [key.replace("[]", ".0") for key, _ in all_fields()]
    meant = [key for key in keys if name in (key, key.replace(".", "_"), key.rpartition(".")[2])]
    return min(meant, key=lambda key: key.count("."), default=None)


def _value_of(option: str, words: Sequence[str]) -> str:
    """What was given to the option, as `--steps 500` or `--steps=500`."""
    for word, following in zip(words, [*words[1:], "..."], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return "..."
