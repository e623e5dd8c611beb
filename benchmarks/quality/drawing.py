"""Pictures of a finished run of any method, drawn by the session of `infer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from sd3tune.evaluation.target import find_target
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.learned import without_unused_tokens
from sd3tune.inference.pipeline import PromptAndSeed
from sd3tune.inference.prepare import prepare
from sd3tune.inference.session import draw
from sd3tune.reporting import Reporter, using

Draw = Callable[[Sequence[PromptAndSeed]], list[Image.Image]]
"""Draws a picture for each prompt and seed."""
BATCH = 32


def drawn_by(run: Path) -> Draw:
    """Return a function that draws with the run's adapter, embedding or model, and with its sampler settings."""

    def draw_all(prompts_and_seeds: Sequence[PromptAndSeed]) -> list[Image.Image]:
        weights = find_target(str(run), "last").weights[0]
        path = str(weights.path)
        given: dict[str, Any] = {"--lora": {"loras": [path]}, "--embedding": {"embeddings": [path]}}.get(
            weights.option, {"base": path}
        )
        with using(Reporter(quiet=True)):
            prepared = prepare(InferenceJob.from_fields(prompt="a shape", batch=BATCH, **given))
            requests = [
                without_unused_tokens(replace(prepared.requests[0], prompt=prompt, seed=seed), prepared.session)
                for prompt, seed in prompts_and_seeds
            ]
            return [image for _, image in draw(prepared.session, requests, one_by_one=False)]

    return draw_all
