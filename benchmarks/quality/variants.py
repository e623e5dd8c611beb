"""The LoRA experiments: variants of the demo's recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sd3tune.commands.demo import CONFIG, PRIOR
from sd3tune.config import Config, parse_config
from sd3tune.nano.tasks import CLASS_PROMPTS, NAME
from sd3tune.nano.world import SHAPES, Thing
from sd3tune.training.loop import Callback, View

PRIOR_KEY = "data.sources.0.prior"
PRIOR_SHAPES, OTHER_SHAPES = SHAPES[:3], SHAPES[3:]
"""Shapes that priors of several prompts name, and shapes that no prior names."""
PRIOR_PROMPTS = [
    prompt for prompt in CLASS_PROMPTS if prompt not in [Thing("", shape).phrase for shape in OTHER_SHAPES]
]
"""The demo's prompts without some shapes, so that the effect on shapes that no prior names can be seen."""


@dataclass(frozen=True)
class Variant:
    """A training that changes some configuration keys of the recipe."""

    group: str
    name: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value; the key of a section replaces the whole section."""
    callbacks: tuple[Callback, ...] = ()
    sources: Callable[[Path], list[dict[str, Any]]] | None = None
    """Draws other pictures than the demo's into a folder, and returns `data.sources`."""
    word: str = NAME
    """The subject's name in captions and prompts."""

    def config(self, run: str, store: str, seed: int) -> Config:
        """Return the configuration of one run. Pictures that are not the demo's are drawn beside the store."""
        values = {**CONFIG, "name": "quality", "output_dir": run, "seed": seed}
        values["data"] = {**CONFIG["data"], "cache_dir": store}
        if self.sources is not None:
            values["data"]["sources"] = self.sources(Path(store).parent)
        for key, value in self.changes.items():
            values = _with(values, key.split("."), value)
        return parse_config(values).config


def _with(tree: Any, path: list[str], value: Any) -> Any:
    """Return a copy of nested dicts and lists with the value at a path replaced."""
    if not path:
        return value
    if isinstance(tree, list):
        place = int(path[0])
        return [*tree[:place], _with(tree[place], path[1:], value), *tree[place + 1 :]]
    return {**tree, path[0]: _with(tree.get(path[0], {}), path[1:], value)}


def masters_in_bf16(view: View) -> None:
    """Emulate training in pure bf16: round the weights to 8 bits of mantissa in each step.

    The arithmetic of the step stays in fp32, which is more precise than in scripts that train bf16 parameters.
    """
    for tensor in view.weights.values():
        tensor.copy_(tensor.to(torch.bfloat16))


def own_prediction(*prompts: str, **others: Any) -> dict[str, Any]:
    return {"kind": "prediction", "prompt": list(prompts), **others}


def _density(**timesteps: Any) -> dict[str, Any]:
    return {"flow.timesteps": timesteps}


def _learning_rates() -> list[Variant]:
    base = CONFIG["optimizer"]["lr"]
    return [Variant("learning rate", f"{base * factor:.2g}", {"optimizer.lr": base * factor}) for factor in (0.3, 3.0)]


RECIPE = Variant("recipe", "the demo's")
PROMPTS = f"{len(PRIOR_PROMPTS)} prompts"
CLASS_IMAGES = {**PRIOR, "prompt": PRIOR_PROMPTS}
WITH_CLASS_IMAGES = Variant("prior preservation", f"class images, {PROMPTS}", {PRIOR_KEY: CLASS_IMAGES})
BESIDE_THE_SCRIPT = {
    "alone": RECIPE,
    "alone, learning rate 0.00075": Variant("learning rate", "0.00075", {"optimizer.lr": 7.5e-4}),
    "with class images": WITH_CLASS_IMAGES,
    "with class images, learning rate 0.002": Variant(
        "prior preservation", "learning rate 0.002", {PRIOR_KEY: CLASS_IMAGES, "optimizer.lr": 2e-3}
    ),
}
"""Both sides change learning rate or prior alike, so a row compares the two sides and not two recipes."""
VARIANTS = (
    RECIPE,
    Variant("prior preservation", "class images", {PRIOR_KEY: {**PRIOR, "prompt": CLASS_PROMPTS[0], "images": 48}}),
    WITH_CLASS_IMAGES,
    Variant("prior preservation", "own prediction", {PRIOR_KEY: own_prediction(CLASS_PROMPTS[0])}),
    Variant("prior preservation", f"own prediction, {PROMPTS}", {PRIOR_KEY: own_prediction(*PRIOR_PROMPTS)}),
    Variant(
        "prior preservation",
        "own prediction, the class and the captions without the name",
        {PRIOR_KEY: own_prediction(CLASS_PROMPTS[0], *CLASS_PROMPTS[1 + len(SHAPES) :])},
    ),
    Variant(
        "prior preservation",
        "own prediction, captions_without",
        {PRIOR_KEY: own_prediction(CLASS_PROMPTS[0], captions_without=NAME)},
    ),
    *(
        Variant(
            "prior preservation",
            f"own prediction, captions_without, drift_limit {limit}",
            {PRIOR_KEY: own_prediction(CLASS_PROMPTS[0], captions_without=NAME, drift_limit=limit)},
        )
        for limit in (0.03, 0.1)
    ),
    Variant("shift", "1", {"flow.shift": 1.0}),
    Variant("shift", "3", {"flow.shift": 3.0}),
    Variant("timesteps", "uniform", _density(kind="uniform")),
    *(
        Variant("timesteps", f"logit-normal, mean {mean}", _density(kind="logit_normal", mean=mean))
        for mean in (-0.5, 0.5)
    ),
    Variant("timesteps", "beta, 2 and 1", _density(kind="beta", alpha=2.0, beta=1.0)),
    Variant(
        "timesteps",
        "half logit-normal, half uniform",
        _density(kind="mixture"),
    ),
    Variant("weighting", "min-SNR", {"flow.weighting": {"kind": "min_snr"}}),
    *(Variant("EMA", f"{decay}", {"ema": {"decay": decay}}) for decay in (0.9, 0.97, 0.99)),
    *(Variant("dropout", f"of the adapter, {share}", {"method.dropout": share}) for share in (0.1, 0.3)),
    *(Variant("dropout", f"of captions, {share}", {"data.caption_dropout": share}) for share in (0.1, 0.3)),
    *(Variant("rank", f"{rank}", {"method.rank": rank, "method.alpha": float(rank)}) for rank in (4, 64)),
    Variant("rank", "64, alpha 16", {"method.rank": 64}),
    Variant("targets", "without attn2", {"method.targets": r"re:transformer_blocks\.\d+\.attn\..*"}),
    Variant("targets", "image stream only", {"method.targets": "attention-image"}),
    Variant(
        "targets", "text stream only", {"method.targets": r"re:transformer_blocks\.\d+\.attn\.(add_.*|to_add_out)"}
    ),
    Variant("targets", "with MLP", {"method.targets": "attention+mlp"}),
    Variant("precision", "bf16, fp32 masters", {"model.dtype": "bf16"}),
    Variant("precision", "bf16, bf16 masters", {"model.dtype": "bf16"}, (masters_in_bf16,)),
    *_learning_rates(),
)
