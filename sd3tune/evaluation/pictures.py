"""The pictures of an evaluation: which are needed, and their drawing through the session of `infer`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd3tune.adapter.embedding import Embedding
from sd3tune.config.run_folder import CONFIG_FILE, read_run_file
from sd3tune.data.sources.folder import images_in
from sd3tune.errors import RunError
from sd3tune.evaluation.request import EvalRequest
from sd3tune.evaluation.target import Target
from sd3tune.inference.image_folder import ImageFolder, draw_missing
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.learned import without_unused_tokens
from sd3tune.inference.prepare import PreparedJob, prepare
from sd3tune.inference.recipes import Recipes, read_recipe
from sd3tune.measures.prompts import Prompts
from sd3tune.runtime.processes import Processes

PICTURES = "pictures"
BASE_ROW = "base"
SCORED, OF_CLASS = "prompt", "class"


@dataclass(frozen=True)
class Picture:
    """A picture that is measured."""

    row: str
    kind: str
    """`SCORED` or `OF_CLASS`."""
    number: int
    """Index of its prompt among those of its kind."""
    seed: int
    file: Path
    prompt: str | None
    scored_as: str | None
    """The text that prompt fidelity compares with; None if the prompt is not known."""


@dataclass(frozen=True)
class _Wanted:
    """A request, and the place of its picture."""

    request: ImageRequest
    picture: Picture


@dataclass(frozen=True)
class Drawing:
    """The pictures to draw with one session."""

    prepared: PreparedJob
    wanted: Sequence[_Wanted]
    folder: ImageFolder

    def missing(self) -> list[_Wanted]:
        """Return the pictures that the folder lacks, each once."""
        existing = self.folder.existing()
        keyed = {self.folder.key(one.request): one for one in self.wanted}
        return [one for key, one in keyed.items() if key not in existing]

    def draw(self, processes: Processes) -> Iterator[Picture]:
        """Draw what is missing, and yield every picture with its file. The processes divide the missing pictures."""
        missing = self.missing()
        processes.wait()  # all have listed the same pictures before one adds any
        mine = missing[processes.rank :: processes.world] if processes.world > 1 else self.wanted
        if mine:
            draw_missing(self.prepared.session, self.folder, [one.request for one in mine])
        processes.wait()
        existing = self.folder.existing()
        for one in self.wanted:
            yield replace(one.picture, file=existing[self.folder.key(one.request)])


def plan_drawings(request: EvalRequest, target: Target, prompts: Prompts, out: Path) -> list[Drawing]:
    """Return the drawings of all rows, the base without adapter first. Checks adapters and base; draws nothing.

    Raises UserError.
    """
    adapters, embeddings, models = (
        [weights for weights in target.weights if weights.option == option]
        for option in ("--lora", "--embedding", "--base")
    )
    drawings = []
    if adapters:
        prepared = prepare(_job(request, loras=[str(weights.path) for weights in adapters]))
        bare = replace(prepared.requests[0], loras=(), noise_offset=prepared.session.conditions.base_noise_offset)
        rows = [(BASE_ROW, bare)]
        rows += [(one.name, replace(bare, loras=((number, 1.0),), noise_offset=prepared.requests[0].noise_offset))
                 for number, one in enumerate(adapters)]  # fmt: skip
        drawings.append(_drawing(request, prepared, rows, prompts, out))
    prepared_embeddings = [(weights, prepare(_job(request, embeddings=[str(weights.path)]))) for weights in embeddings]
    if prepared_embeddings:
        drawings.append(_base_of_embedding(request, prepared_embeddings[0][1], prompts, out))
    for weights, prepared in prepared_embeddings:
        drawings.append(_drawing(request, prepared, [(weights.name, prepared.requests[0])], prompts, out))
    prepared_models = [(weights, prepare(_job(request, base=str(weights.path)))) for weights in models]
    if prepared_models:
        drawings += _base_of_model(request, target, prepared_models[0][1], prompts, out)
    for weights, prepared in prepared_models:
        drawings.append(_drawing(request, prepared, [(weights.name, prepared.requests[0])], prompts, out))
    return drawings


def seconds_each(target: Target) -> float | None:
    """Return the seconds that a preview of the run took, as an estimate for one picture; None if it drew none."""
    if target.run is None or target.config is None or not target.config.preview.prompts:
        return None
    timings = read_run_file(target.run).get("timings")
    seconds = timings.get("preview_s") if isinstance(timings, dict) else None
    count = len(list((target.run / "samples").glob("*-*.png")))
    return seconds / count if isinstance(seconds, int | float) and seconds > 0 and count else None


def pictures_of(folder: Path) -> list[Picture]:
    """Return the pictures of a folder, grouped by the prompts in their recipes. Raises RunError if there are none."""
    found, numbers = list[Picture](), dict[str | None, int]()
    taken = dict[str | None, int]()
    for path in sorted(images_in(folder)):
        recipe = read_recipe(path) or {}
        if "sheet" in recipe:
            continue
        prompt = recipe.get("prompt") if isinstance(recipe.get("prompt"), str) else None
        number = numbers.setdefault(prompt, len(numbers))
        seed = taken[prompt] = taken.get(prompt, -1) + 1
        found.append(Picture(folder.resolve().name, SCORED, number, seed, path, prompt, prompt))
    if not found:
        raise RunError(f"{folder}: holds no pictures; name a folder of pictures, a run or an adapter")
    return found


def _job(request: EvalRequest, **model: Any) -> InferenceJob:
    """Return a job for one picture; the requests of all pictures are copies of its request."""
    given = {"base": request.base, "steps": request.steps, "size": request.size, "batch": request.batch}
    return InferenceJob.from_fields(**{**given, "prompt": "a photo", **model})


def _base_of_embedding(request: EvalRequest, first: PreparedJob, prompts: Prompts, out: Path) -> Drawing:
    """Return the drawing of the base, which reads the class words in place of the token."""
    session = replace(first.session, embeddings=())
    bare = replace(first.requests[0], noise_offset=session.conditions.base_noise_offset)
    prepared = replace(first, session=session)
    return _drawing(request, prepared, [(BASE_ROW, bare)], prompts, out, unused=first.session.embeddings)


def _base_of_model(
    request: EvalRequest, target: Target, first: PreparedJob, prompts: Prompts, out: Path
) -> list[Drawing]:
    """Return the drawing of the base of a full fine-tune; empty if there is none, or if it is not known."""
    scratch = first.session.conditions.base.contract.get("init") == "random"
    if scratch or (target.run is None and request.base is None):
        return []
    like = first.requests[0]
    model = {"config": target.run / CONFIG_FILE} if target.run else {}
    job = replace(_job(request, **model), given={"prompt": "a photo", "steps": like.steps, "guidance": like.guidance,
                                                  "size": like.size})  # fmt: skip
    prepared = prepare(job)
    return [_drawing(request, prepared, [(BASE_ROW, prepared.requests[0])], prompts, out)]


def _drawing(
    request: EvalRequest,
    prepared: PreparedJob,
    rows: Sequence[tuple[str, ImageRequest]],
    prompts: Prompts,
    out: Path,
    unused: Sequence[Embedding] = (),
) -> Drawing:
    wanted = []
    for row, common in rows:
        for kind, several in ((SCORED, prompts.scored), (OF_CLASS, prompts.of_class)):
            for number, prompt in enumerate(several):
                filled = replace(common, **prompt.values, prompt=prompt.text)
                filled = without_unused_tokens(filled, prepared.session, unused)
                for seed in range(filled.seed, filled.seed + request.seeds):
                    name = f"{re.sub(r'[^a-z0-9]+', '-', row.lower())}-{kind}{number:02d}-seed{seed}"
                    picture = Picture(row, kind, number, seed, out, prompt.text, prompt.scored_as)
                    wanted.append(_Wanted(replace(filled, seed=seed, name=name), picture))
    return Drawing(prepared, wanted, ImageFolder(out / PICTURES, Recipes(prepared.session)))
