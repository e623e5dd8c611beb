"""The shape of a transformer to train from scratch: the base's shape, changed by the configuration, and checked."""

from __future__ import annotations

from typing import Any

from sd3tune.config.sections.model import TransformerConfig
from sd3tune.errors import ConfigError, ModelError
from sd3tune.model.base.base import Base

_USUAL: dict[str, Any] = {"patch_size": 2, "qk_norm": None, "dual_attention_layers": []}
_NEEDED = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "sample_size",
    "pos_embed_max_size",
)


def new_shape(base: Base, configured: TransformerConfig | None) -> dict[str, Any]:
    """Return the `config.json` of a new transformer: `configured`, completed from the base.

    Widths that the base's text encoders and VAE determine are taken from them.

    Raises ConfigError with every key that does not fit.
    """
    given = configured.model_dump(exclude_none=True) if configured else {}
    if given.get("qk_norm") == "none":
        given["qk_norm"] = None
    config = {**_USUAL, **_shape_of(base), **given}
    if "dual_attention_layers" not in given:  # the base may have more blocks
        blocks = range(config.get("num_layers", 0))
        config["dual_attention_layers"] = [block for block in config["dual_attention_layers"] if block in blocks]
    missing = [key for key in _NEEDED if key not in config]
    if missing:
        raise ConfigError(
            f"model.transformer: {base.name} has no transformer/config.json to take {', '.join(missing)} from; "
            "give them here"
        )
    width = config["num_attention_heads"] * config["attention_head_dim"]
    required = {**_widths_of_the_parts(base, config), "caption_projection_dim": (width, "heads times their width")}
    problems = [
        f"model.transformer.{key}: {given[key]} does not fit; it is {value}, {why}: leave the key out"
        for key, (value, why) in required.items()
        if given.get(key, value) != value
    ]
    if width % 4:
        problems.append(f"model.transformer: {width} is no width that position embeddings have; a multiple of 4 is one")
    beyond = [block for block in config["dual_attention_layers"] if block >= config["num_layers"]]
    if beyond:
        key, last = "model.transformer.dual_attention_layers", config["num_layers"] - 1
        problems.append(f"{key}: there is no block {beyond[0]}; the last one is {last}")
    if problems:
        raise ConfigError(*problems)
    return {key: value for key, value in config.items() if not key.startswith("_")} | {
        key: value for key, (value, _) in required.items()
    }


def _shape_of(base: Base) -> dict[str, Any]:
    is_there = base.kind in ("hub", "file") or (base.path / "transformer" / "config.json").is_file()
    return base.config("transformer") if is_there else {}


def _widths_of_the_parts(base: Base, config: dict[str, Any]) -> dict[str, tuple[int, str]]:
    """Return key -> (value, reason) for the widths that the base's VAE and text encoders determine.

    Raises ModelError if they do not fit each other.
    """
    clips = [base.config(part) for part in ("text_encoder", "text_encoder_2")]
    pooled, hidden = (sum(clip[key] for clip in clips) for key in ("projection_dim", "hidden_size"))
    latents = base.config("vae")["latent_channels"], "the channels of the base's VAE"
    try:
        text = base.config("text_encoder_3")["d_model"], "the width of the base's T5"
    except ModelError:  # without T5, its embeddings are zeros of any width
        text = config.get("joint_attention_dim", hidden), "the width of the base's text"
    if text[0] < hidden:
        raise ModelError(f"{base.name}: its CLIP encoders are {hidden} wide together, more than {text[0]}, {text[1]}")
    return {
        "in_channels": latents,
        "out_channels": latents,
        "pooled_projection_dim": (pooled, "the projections of the base's CLIP encoders together"),
        "joint_attention_dim": text,
    }
