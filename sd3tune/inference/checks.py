"""Checks of a request, made before anything large is loaded."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sd3tune.errors import ConfigError
from sd3tune.files.text import flaw
from sd3tune.inference import image_request
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import PARAMETERS as JOB_PARAMETERS
from sd3tune.inference.job import InferenceJob, Memory
from sd3tune.inference.parameters import Parameter
from sd3tune.model.load.quantized import FORMS, missing_library

Named = Callable[[str], str]
"""Field -> its name in messages, such as `--steps` or `p.csv:3: steps`."""


def flag_of(field: str) -> str:
    """Return the option of a field of `ImageRequest`, such as `--noise-offset`."""
    return image_request.PARAMETERS[field].flag


def check_job(job: InferenceJob) -> None:
    """Raise ConfigError with a line for each problem that the fields alone show."""
    given, problems = job.given, []
    varied = {axis.partition("=")[0] for axis in job.grid}
    if not (job.loras or job.embeddings) and job.base is None and job.config is None and "lora" not in varied:
        problems.append("give --lora PATH, or --base (or --config) to draw with a base model alone")
    if job.grid and (job.prompts is not None or job.num != 1):
        flag = "--num" if job.prompts is None else "--prompts"
        problems.append(f"{flag}: not with --grid, whose axes choose the images; for several seeds give it seed=0,1,2")
    if "prompt" not in given and job.prompts is None and "prompt" not in varied:
        problems.append("give --prompt, the text to draw; or a file of them with --prompts, or a picture with --from")
    if "prompt" in given and job.prompts is not None:
        problems.append("--prompt: each line of --prompts has its own; leave one of the two out")
    problems += _out_of_limits(job, JOB_PARAMETERS, lambda name: JOB_PARAMETERS[name].flag)
    problems += _memory_problems(job.memory)
    if "strength" in given and "image" not in given and job.prompts is None:
        problems.append(f"--strength {given['strength']:g}: the share of --image that is redrawn; give --image, too")
    problems += problems_of(ImageRequest(**given), flag_of)
    if problems:
        raise ConfigError(*problems)


def problems_of(request: ImageRequest, named: Named) -> list[str]:
    """Return a line for each invalid value, apart from conflicts between values."""
    problems = _out_of_limits(request, image_request.PARAMETERS, named)
    if not 0 <= request.slg_start < request.slg_stop <= 1:
        start, stop = f"{named('slg_start')} {request.slg_start:g}", f"{named('slg_stop')} {request.slg_stop:g}"
        problems.append(f"{start}, {stop}: shares of the steps, the first below the second, from 0 to 1")
    return problems


def conflicts_of(request: ImageRequest, named: Named) -> list[str]:
    """Return a line for each value that conflicts with the number of steps or the guidance."""
    problems = []
    if request.image is not None and request.steps * request.strength < 1 <= request.steps:
        least = math.ceil(1000 / request.steps) / 1000
        problems.append(
            f"{named('strength')} {request.strength:g}: no step of {request.steps} is left; at least {least:g}"
        )
    if request.mask is not None and request.image is None:
        problems.append(f"{named('mask')} {request.mask}: the part of {named('image')} that is redrawn; give both")
    if request.slg is not None and request.guidance <= 1:
        problems.append(f"{named('slg')} {request.slg:g}: needs guidance above 1; it is {request.guidance:g}")
    return problems


def unsupported_by_base(request: ImageRequest, named: Named, transformer: Any) -> list[str]:
    """Return a line for each value that a base with this transformer config does not support."""
    problems = []
    largest = transformer.pos_embed_max_size * transformer.patch_size * 8
    if request.size and max(request.size) > largest:
        size = f"{request.size[0]}x{request.size[1]}"
        problems.append(f"{named('size')} {size}: this base draws at most {largest} pixels a side")
    if request.slg is not None and max(request.slg_layers, default=0) >= transformer.num_layers:
        layers = ",".join(map(str, request.slg_layers))
        problems.append(f"{named('slg_layers')} {layers}: this base has the blocks 0 to {transformer.num_layers - 1}")
    return problems


def _out_of_limits(owner: object, parameters: Mapping[str, Parameter], named: Named) -> list[str]:
    """Return a line for each text that no tokenizer can read, and for each value outside its field's limits."""
    problems = []
    for name, parameter in parameters.items():
        value = getattr(owner, name)
        unreadable = flaw(value) if isinstance(value, str) else None
        if unreadable is not None:
            problems.append(f"{named(name)}: {unreadable}")
        elif (problem := parameter.check(value)) is not None:
            problems.append(f"{named(name)} {_shown(value, parameter)}: {problem}")
    return problems


def _shown(value: object, parameter: Parameter) -> str:
    if isinstance(value, tuple):
        return ("x" if parameter.type == tuple[int, int] else ",").join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _memory_problems(memory: Memory) -> list[str]:
    problems = []
    forms: Sequence[str] = (*FORMS, "none")
    if memory.quantize is not None and memory.quantize not in forms:
        problems.append(f"--quantize {memory.quantize}: one of {', '.join(forms)}")
    elif memory.quantize not in (None, "none"):
        problems += missing_library("--quantize", memory.quantize)
    return problems
