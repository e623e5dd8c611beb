"""The model card: what was trained, how to use it, how it was made, and what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sd3tune.atomic import write_text
from sd3tune.config import Config

_CARD = """\
---
{header}
---

# {name}

{what}, trained with sd3tune.{prompting}

```bash
sd3tune infer {infer} --prompt {quoted}
```

or with diffusers alone:

```python
{load}
image = pipe({prompt!r}, max_sequence_length={length}, height={side}, width={side}).images[0]
image.save("image.png")
```

## How it was trained

| | |
|---|---|
{facts}

## Measured

The velocity loss at fixed noise, on training images: it shows that something was learned, not that it generalises.

| sigma | base | {trained} |
|---|---|---|
{losses}

One denoising step changes by {change:.3g} %.
{held_out}"""

_WITHOUT_T5 = ", text_encoder_3=None, tokenizer_3=None"


def write_card(run: Path, config: Config, contract: Mapping[str, Any], report: Mapping[str, Any]) -> Path:
    """Write `run/README.md`."""
    path = run / "README.md"
    write_text(path, card(config, contract, report))
    return path


def card(config: Config, contract: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The card's Markdown with its YAML header."""
    prompt, product = contract["instance_prompt"] or "a photo", _PRODUCTS[contract["method"]]
    return _CARD.format(
        header=yaml.safe_dump(_header(contract), sort_keys=False, allow_unicode=True).strip(),
        name=config.name,
        what=product.what(contract),
        infer=product.infer,
        trained=product.trained,
        prompting=_prompting(contract["instance_prompt"], contract["trigger"]),
        quoted=shlex.quote(prompt),
        load=product.load(contract),
        prompt=prompt,
        length=contract["max_sequence_length"],
        side=contract["resolution"],
        facts="\n".join(f"| {name} | {value} |" for name, value in _facts(config, contract).items()),
        losses=_losses(report["fixed_noise_loss"]),
        change=100 * report["velocity_change"],
        held_out=_held_out(report.get("held_out"), product),
    )


def _header(contract: Mapping[str, Any]) -> dict[str, Any]:
    """What the Hub reads."""
    header: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": [contract["method"], "sd3tune", "text-to-image", "diffusers"],
    }
    relation = _PRODUCTS[contract["method"]].relation
    if contract["base_kind"] == "hub" and contract.get("init") != "random":
        header |= {
            "base_model": contract["base"],
            "base_model_relation": relation,
            "pipeline_tag": "text-to-image",
        }
    prompt = contract["instance_prompt"]
    return header | ({"instance_prompt": prompt} if prompt else {})


def _facts(config: Config, contract: Mapping[str, Any]) -> dict[str, str]:
    """How it was trained."""
    sigma = contract["timesteps"]
    drawn = ", ".join(f"{key} {value:g}" for key, value in sigma.items() if key != "kind")
    return {
        "base model": f"{contract['base']}" + (f" at {contract['base_revision']}" if contract["base_revision"] else ""),
        **_PRODUCTS[contract["method"]].facts(contract),
        "steps": f"{config.train.total_steps}, batch {config.train.batch_size} x {config.train.gradient_accumulation}",
        "optimizer": f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.schedule.kind}",
        "sigma": f"{sigma['kind']}{f' ({drawn})' if drawn else ''}, shift {contract['shift']:g}, "
        f"weighting {contract['weighting']['kind']}",
        "resolution": f"{contract['resolution']} px" + (", aspect buckets" if contract["buckets"] else ", squares"),
        "T5 tokens": f"{contract['max_sequence_length']}" + ("" if "t5" in contract["encoders"] else ", T5 not used"),
        **_encoder_files(contract),
        **_priors(config),
        "dropout": f"caption {contract['caption_dropout']:g}, text encoder {contract['encoder_dropout']:g}",
        "weights": "exponential moving average" if contract["weights"] == "ema" else "as trained",
        "sd3tune": contract["sd3tune_version"],
    }


def _priors(config: Config) -> dict[str, str]:
    used = [source.prior for source in config.data.sources if source.prior and source.prior.weight > 0]
    kinds = {"images": "class images", "prediction": "the base's prediction"}
    described = [f"{kinds[prior.kind]} of `{prior.prompt}`, weight {prior.weight:g}" for prior in used]
    return {"prior preservation": "; ".join(dict.fromkeys(described))} if used else {}


def _held_out(measured: Mapping[str, Any] | None, product: _Product) -> str:
    """A sentence on images that were not trained on, if there were any."""
    if not measured or measured["last"]["loss"] is None:
        return ""
    last, best = measured["last"], measured["best"]
    of = "one image that was" if last["images"] == 1 else f"{last['images']} images that were"
    better = "" if best["step"] == last["step"] else f", and {best['loss']:.4f} at step {best['step']}"
    return (
        f"\nOn {of} not trained on, the mean loss over all noise levels is {last['loss']:.4f}{better}; "
        f"{product.untrained} it is {last['base_loss']:.4f}.\n"
    )


def _losses(loss: Mapping[str, Any]) -> str:
    return "\n".join(
        f"| {at:g} | {before:.4f} | {after:.4f} |"
        for at, before, after in zip(loss["sigma"], loss["base"], loss["trained"], strict=True)
    )


def _prompting(prompt: str | None, trigger: str | None) -> str:
    if prompt:
        return f" Prompt it with `{prompt}`."
    return f" Put `{trigger}` into the prompt." if trigger else ""


def _load_adapter(contract: Mapping[str, Any]) -> str:
    """The code that loads the base as the adapter was trained on it, and the adapter."""
    pipeline, imports, lines, more = "StableDiffusion3Pipeline", "StableDiffusion3Pipeline", [], ""
    base = contract["base"] if contract["base_kind"] == "hub" else f"path/to/{contract['base']}"
    if contract["base_kind"] == "file":  # the rest of the pipeline is that of the released model of its shape
        imports = f"SD3Transformer2DModel, {pipeline}"
        lines = [f"transformer = SD3Transformer2DModel.from_single_file({base!r}, dtype=torch.bfloat16)"]
        base, more = contract["base_released_as"] or "path/to/its/folder", ", transformer=transformer"
    if "t5" not in contract["encoders"]:
        more += _WITHOUT_T5
    lines.append(f'pipe = {pipeline}.from_pretrained({base!r}, dtype=torch.bfloat16{more}).to("cuda")')
    lines.append('pipe.load_lora_weights("adapter", weight_name="pytorch_lora_weights.safetensors")')
    return "\n".join(["import torch", f"from diffusers import {imports}", "", *lines])


def _encoder_files(contract: Mapping[str, Any]) -> dict[str, str]:
    files = contract.get("encoder_files", {})
    return {"text encoders": ", ".join(f"{name} from {used['file']}" for name, used in files.items())} if files else {}


def _load_model(contract: Mapping[str, Any]) -> str:
    more = "" if "t5" in contract["encoders"] else _WITHOUT_T5
    lines = [
        "import torch",
        "from diffusers import StableDiffusion3Pipeline",
        "",
        f'pipe = StableDiffusion3Pipeline.from_pretrained("model", dtype=torch.bfloat16{more}).to("cuda")',
    ]
    return "\n".join(lines)


def _whole_model(contract: Mapping[str, Any]) -> str:
    base = contract["base"]
    if contract["init"] == "random":
        return f"A model of Stable Diffusion 3's kind, from scratch, with the text encoders and the VAE of {base}"
    return f"{base}, all of its transformer fine-tuned"


@dataclass(frozen=True)
class _Product:
    """How a card speaks of what a method makes."""

    what: Callable[[Mapping[str, Any]], str]
    infer: str
    load: Callable[[Mapping[str, Any]], str]
    facts: Callable[[Mapping[str, Any]], dict[str, str]]
    relation: str
    """To the base model, in the Hub's words."""
    trained: str
    untrained: str


_PRODUCTS = {
    "lora": _Product(
        what=lambda contract: f"A LoRA adapter for {contract['base']}",
        infer="--lora .",
        load=_load_adapter,
        facts=lambda contract: {
            "rank, alpha": f"{contract['rank']}, {contract['alpha']:g} (folded into the file: alpha = rank there)"
        },
        relation="adapter",
        trained="with the adapter",
        untrained="without the adapter",
    ),
    "full": _Product(
        what=_whole_model,
        infer="--base model",
        load=_load_model,
        facts=lambda contract: {"trained": f"the whole transformer, in the file as {contract['export_dtype']}"},
        relation="finetune",
        trained="trained",
        untrained="untrained",
    ),
}
