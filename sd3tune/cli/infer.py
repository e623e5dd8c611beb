"""`sd3tune infer`. Its options are generated from the fields of an image request and of an inference job."""

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
    """Draw images with one or more adapters, using the inference settings stored in them."""
    job = InferenceJob.from_fields(**options)
    with quick_imports("infer"):
        from sd3tune.commands.infer import run_infer

    for path in run_infer(job):
        result(path)


def _argument(parameter: Parameter, has_default: bool) -> Argument:
    """Return the argument of `infer` from which typer makes the parameter's option."""
    option = typer.Option(
        parameter.flags, help=parameter.help, metavar=parameter.metavar, rich_help_panel=parameter.panel
    )
    kind, default = _kind(parameter.type), parameter.default if has_default else None
    if default is None or default == ():
        kind, default = kind | None, None
    return Argument(parameter.name, Argument.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def _kind(annotation: Any) -> Any:
    """Return the option's type for typer; `str` for fields with their own parser."""
    if get_origin(annotation) is Sequence:
        return list[get_args(annotation)[0]]  # type: ignore[misc]
    return annotation if annotation in (str, int, float, bool, Path) else str


def _signature() -> Signature:
    """Return the signature of `infer`, with one argument per option, ordered by panel."""
    options = [parameter for parameter in ALL_PARAMETERS.values() if parameter.help is not None]
    by_panel = sorted(options, key=lambda parameter: PANELS.index(parameter.panel))
    # An unset image option takes its value from the adapter or a recipe, so it has no default here.
    return Signature([_argument(one, one.name not in image_request.PARAMETERS) for one in by_panel])


infer.__signature__ = _signature()  # type: ignore[attr-defined]
infer.__annotations__ = {name: one.annotation for name, one in _signature().parameters.items()}
