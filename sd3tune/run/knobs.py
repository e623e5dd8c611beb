"""The next setting to change when a phase of a run does not fit in memory."""

from __future__ import annotations

from sd3tune.config import Config
from sd3tune.config.meaning import leaner_values
from sd3tune.methods import Method
from sd3tune.model.compute.swap import BUFFERS

_SHARES = {"nf4": "a third", "int8": "half"}
"""Form -> its share of the base's memory in 16 bits, the smallest first."""
_SWAPPED = "so many blocks' weights stay in system memory until they are used"


def encoding_knob(config: Config) -> str:
    """Return the advice for encoding. Text encoders and VAE are loaded one at a time, and T5 is by far the largest."""
    model = config.model
    if model.t5 and model.t5_device == "auto":
        if model.t5_quantize == "none":
            return (
                "set model.t5_quantize=int8, which halves T5's memory, or model.t5_device=cpu, which takes none of it"
            )
        return "set model.t5_device=cpu to encode captions with T5 there"
    if model.t5:
        return "set model.t5=false to do without T5's 5 billion parameters, or run `sd3tune cache` on a larger machine"
    return "run `sd3tune cache` on a larger machine and use its store (data.cache_dir)"


def more_swapped(config: Config, blocks: int) -> int | None:
    """Return a higher number of swapped blocks for a base with `blocks`: half of them, then all; None if none helps."""
    swapped = config.train.swap_blocks or BUFFERS
    higher = (count for count in (max(blocks // 2, BUFFERS + 1), blocks) if swapped < count <= blocks)
    return next(higher, None) if config.method.fits_swapped_blocks else None


def lower_resolution(config: Config) -> int | list[int] | None:
    """Return a lower `data.resolution`: the next released one, or several sizes without the largest.

    None if there is none, or if a source has sizes of its own.
    """
    data = config.data
    if any(source.resolution is not None for source in data.sources):
        return None
    if len(data.sides) > 1:
        return data.sides[:-1]
    return next((side for side in leaner_values(config, "data.resolution") if side < data.side), None)


def loading_knob(config: Config, blocks: int) -> str:
    """Return the advice for loading the base, which has `blocks`."""
    if config.model.dtype == "fp32":
        return "set model.dtype=auto, which takes half the memory on a GPU"
    if (swapped := more_swapped(config, blocks)) is not None:
        return f"set train.swap_blocks={swapped}: {_SWAPPED}"
    if form := _quantised(config):
        return f"set model.quantize={form}, which holds the base in {_SHARES[form]} of its memory"
    return f"{config.model.base} does not fit; take a smaller base, such as stabilityai/stable-diffusion-3.5-medium"


def training_knob(config: Config, method: Method, blocks: int) -> str:
    """Return the advice for training a base with `blocks`, the cheapest first.

    The order is: micro-batch size, recomputation, swapped blocks, precision, resolution, capacity.
    """
    train, side = config.train, config.data.side
    if train.batch_size > 1 and not train.fused_backward:
        factor = next(n for n in range(2, train.batch_size + 1) if train.batch_size % n == 0)
        smaller, more = train.batch_size // factor, train.gradient_accumulation * factor
        return (
            f"set train.batch_size={smaller} and train.gradient_accumulation={more}: "
            f"the same batch for 1/{factor} of the activations"
        )
    if train.gradient_checkpointing == "none":
        return "set train.gradient_checkpointing=selective: a sixth of the activations for a quarter more time"
    if train.checkpointed_blocks is not None:
        return "set train.checkpointed_blocks=null: all blocks are recomputed"
    if train.gradient_checkpointing == "selective":
        return "set train.gradient_checkpointing=block: half of those activations, for a tenth more time"
    if (swapped := more_swapped(config, blocks)) is not None:
        return f"set train.swap_blocks={swapped}: {_SWAPPED}"
    if form := _quantised(config):
        return f"set model.quantize={form}: {_SHARES[form]} of the base's memory, for a little exactness"
    lower = lower_resolution(config)
    if lower is not None:
        share = (lower if isinstance(lower, int) else max(lower)) / side
        written = str(lower).replace(" ", "")
        return f"set data.resolution={written}: {share**2:.0%} of the activations"
    advised = next((saving for saving in method.savings(config) if saving.words), None)
    if advised is not None:
        return f"set {advised.typed}: {advised.words}"
    return "take a smaller base, or a device with more memory"


def _quantised(config: Config) -> str | None:
    """Return the smallest form that the base can be quantised to; None if there is none, or if it is quantised."""
    forms = _SHARES if config.model.quantize == "none" else {}
    return next((form for form in forms if config.method.fits_base(form)), None)
