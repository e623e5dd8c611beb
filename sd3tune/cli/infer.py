"""`sd3tune infer`. Its options are the fields of an image request and of an inference job; none is declared here."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import Parameter as Argument
from inspect import Signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer

from sd3tune.cli.imports import quick_imports
from sd3tune.inference import image_request
from sd3tune.inference.job import ALL_PARAMETERS, InferenceJob
from sd3tune.inference.parameters import PANELS, Parameter
from sd3tune.reporting import result


def infer(**options: Any) -> None:
    """Draw images with one or several adapters, with the settings they were trained with."""
    job = InferenceJob.from_fields(**options)
    with quick_imports("infer"):
        from sd3tune.commands.infer import run_infer

    for path in run_infer(job):
        result(path)


def _argument(parameter: Parameter, has_default: bool) -> Argument:
    """Return the argument of `infer` that typer makes the parameter's option of."""
    option = typer.Option(
        parameter.flags, help=parameter.help, metavar=parameter.metavar, rich_help_panel=parameter.panel
    )
    kind, default = _kind(parameter.type), parameter.default if has_default else None
    if default is None or default == ():
        kind, default = kind | None, None
    return Argument(parameter.name, Argument.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _kind(of_field: Any) -> Any:
    """Return the type that typer reads; a text where the field has a reader of its own."""
    if get_origin(of_field) is Sequence:
        return list[get_args(of_field)[0]]  # type: ignore[misc]
    return of_field if of_field in (str, int, float, bool, Path) else str


def _signature() -> Signature:
    """Return the signature with an argument for each parameter that is an option, ordered by panel."""
    options = [parameter for parameter in ALL_PARAMETERS.values() if parameter.help is not None]
    by_panel = sorted(options, key=lambda parameter: PANELS.index(parameter.panel))
    # What an image leaves out comes from the adapter or a recipe, so its options have no default.
    return Signature([_argument(one, one.name not in image_request.PARAMETERS) for one in by_panel])


infer.__signature__ = _signature()  # type: ignore[attr-defined]
infer.__annotations__ = {name: one.annotation for name, one in _signature().parameters.items()}
