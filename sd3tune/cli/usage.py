"""One-line explanations of usage errors, with the correct command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer

from sd3tune.config.shape import all_fields
from sd3tune.reporting import say

UsageError: Any = typer.BadParameter.__mro__[2]
"""Click's ClickException, from the click that typer bundles, or in older versions from the installed one."""


def usage_problem(error: Any) -> str | None:
    """Return the line for a usage error of typer; None if the command has no arguments, and prints its help instead."""
    context = error.ctx
    if type(error).__name__ == "NoArgsIsHelpError":
        say(*error.message.split("\n") if error.message else ())  # empty if rich has already printed it
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
    """Return the config key for an option such as `--steps` or `--train-batch-size`; None if there is none."""
    name = option.lstrip("-").partition("=")[0].replace("-", "_")
    keys = [key.replace("[]", ".0") for key, _ in all_fields()]
    meant = [key for key in keys if name in (key, key.replace(".", "_"), key.rpartition(".")[2])]
    return min(meant, key=lambda key: key.count("."), default=None)


def _value_of(option: str, words: Sequence[str]) -> str:
    """Return the value of an option typed as `--steps 500` or `--steps=500`, else `...`."""
    for word, following in zip(words, [*words[1:], "..."], strict=True):
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return "..."
