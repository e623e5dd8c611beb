"""The model card: what the adapter is, how to use it, how it was made, and what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sd3tune.atomic import write_text
from sd3tune.config import Config

_SNIPPET = """\
import torch
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained({base!r}, torch_dtype=torch.bfloat16{without}).to("cuda")
pipe.load_lora_weights("adapter", weight_name="pytorch_lora_weights.safetensors")
image = pipe({prompt!r}, max_sequence_length={length}, height={side}, width={side}).images[0]
image.save("image.png")"""


def write_card(run: Path, config: Config, contract: Mapping[str, Any], report: Mapping[str, Any]) -> Path:
    """Write `run/README.md`."""
    path = run / "README.md"
    write_text(path, card(config, contract, report))
    return path


def card(config: Config, contract: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    """The card's Markdown with its YAML header."""
    header: dict[str, Any] = {
        "library_name": "diffusers",
        "tags": ["lora", "sd3tune", "text-to-image", "diffusers"],
    }
    on_hub = contract["base_kind"] == "hub"
    if on_hub:
        header |= {
            "base_model": contract["base"],
            "base_model_relation": "adapter",
            "pipeline_tag": "text-to-image",
        }
    prompt = contract["instance_prompt"]
    if prompt:
        header["instance_prompt"] = prompt
    loss, sigma = report["fixed_noise_loss"], contract["timesteps"]
    drawn = ", ".join(f"{key} {value:g}" for key, value in sigma.items() if key != "kind")
    facts = {
        "base model": f"{contract['base']}" + (f" at {contract['base_revision']}" if contract["base_revision"] else ""),
        "rank, alpha": f"{contract['rank']}, {contract['alpha']:g} (folded into the file: alpha = rank there)",
        "steps": f"{config.train.total_steps}, batch {config.train.batch_size} x {config.train.gradient_accumulation}",
        "optimizer": f"{config.optimizer.kind}, learning rate {config.optimizer.lr:g}, {config.schedule.kind}",
        "sigma": f"{sigma['kind']}{f' ({drawn})' if drawn else ''}, shift {contract['shift']:g}, "
        f"weighting {contract['weighting']['kind']}",
        "resolution": f"{contract['resolution']} px" + (", aspect buckets" if contract["buckets"] else ", squares"),
        "T5 tokens": f"{contract['max_sequence_length']}" + ("" if "t5" in contract["encoders"] else ", T5 not used"),
        "dropout": f"caption {contract['caption_dropout']:g}, text encoder {contract['encoder_dropout']:g}",
        "weights": "exponential moving average" if contract["weights"] == "ema" else "as trained",
        "sd3tune": contract["sd3tune_version"],
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    losses = "\n".join(
        f"| {at:g} | {before:.4f} | {after:.4f} |"
        for at, before, after in zip(loss["sigma"], loss["base"], loss["adapter"], strict=True)
    )
    snippet = _SNIPPET.format(
        base=contract["base"] if on_hub else f"path/to/{contract['base']}",
        without="" if "t5" in contract["encoders"] else ", text_encoder_3=None, tokenizer_3=None",
        prompt=prompt or "a photo",
        length=contract["max_sequence_length"],
        side=contract["resolution"],
    )
    return f"""---
{yaml.safe_dump(header, sort_keys=False, allow_unicode=True).strip()}
---

# {config.name}

A LoRA adapter for {contract["base"]}, trained with sd3tune.{f" Prompt it with `{prompt}`." if prompt else ""}

```bash
sd3tune infer --lora . --prompt {shlex.quote(prompt or "a photo")}
```

or with diffusers alone:

```python
{snippet}
```

## How it was trained

| | |
|---|---|
{table}

## Measured

The velocity loss at fixed noise, on training images: it shows that something was learned, not that it generalises.

| sigma | base | with the adapter |
|---|---|---|
{losses}

One denoising step changes by {100 * report["velocity_change"]:.3g} %.
"""
