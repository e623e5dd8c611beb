"""Load the parts of a base model one at a time: frozen, in eval mode, from safetensors only.

Weights are read directly in the requested dtype, as T5 computes other values if it is cast afterwards. A part that is
truncated, incomplete, not finite or of other shapes than in its config raises ModelError with the file. On the meta
device only the config is read, and the model has names, shapes and dtypes but no values. Text encoders and pipelines
are imported on use: a run with cached captions needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ModelMixin, SD3Transformer2DModel
from torch import nn

from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.base.progress_bars import no_progress_bars
from sd3tune.model.base.weights import tensor_headers, weight_files
from sd3tune.model.load.random_weights import random_transformer
from sd3tune.model.load.single_file import from_file, without_tables
from sd3tune.model.load.text import TextEncoder

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

Device = str | torch.device
Model = TypeVar("Model", bound=nn.Module)
Loaded = TypeVar("Loaded")
Prepare = Callable[[SD3Transformer2DModel], None]


def load_transformer(
    base: Base, dtype: torch.dtype, device: Device = "cpu", prepare: Prepare | None = None
) -> SD3Transformer2DModel:
    """Load the MMDiT. Raises ModelError for weights that are missing or unexpected for its config.

    `prepare` modifies the model on the CPU, before it moves to its device; modules that it removes stay on the CPU.
    """
    if prepare is not None:
        transformer = load_transformer(base, dtype, device if _is_meta(device) else "cpu")
        prepare(transformer)
        return transformer.to(device)
    if _is_meta(device):
        return _cast(empty_transformer(base), dtype)
    if base.random:
        return random_transformer(base.random, dtype).to(device).eval().requires_grad_(False)
    return _load_model(SD3Transformer2DModel, base, "transformer", dtype, device)


def stored_dtype(base: Base) -> torch.dtype:
    """Return the dtype in which the transformer is stored; bf16 if there are several, or fewer than 16 bits."""
    found = base.in_file("transformer")
    if found is not None:
        headers = [tensor for name, tensor in tensor_headers(found.file).items() if name.startswith(found.prefix)]
    else:
        headers = [one for file in weight_files(base.folder("transformer")) for one in tensor_headers(file).values()]
    names = {tensor["dtype"] for tensor in headers}
    return {"F32": torch.float32, "F16": torch.float16}.get(names.pop() if len(names) == 1 else "", torch.bfloat16)


def load_vae(base: Base, dtype: torch.dtype, device: Device = "cpu") -> AutoencoderKL:
    """Load the VAE. Use fp32 or bf16: in fp16 it decodes to black images."""
    if _is_meta(device):
        vae: AutoencoderKL = _empty(base, "vae", AutoencoderKL.from_config)
        return _cast(vae, dtype)
    return _load_model(AutoencoderKL, base, "vae", dtype, device)


def vae_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the VAE's dtype in a model of `dtype`: fp32 in place of fp16, in which it overflows."""
    return torch.float32 if dtype is torch.float16 else dtype


def text_encoder_shape(base: Base, encoder: str, dtype: torch.dtype) -> nn.Module:
    """Return a text encoder without weights, on the meta device, with the dtypes of a loaded one."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    model_class, config_class = (
        (T5EncoderModel, T5Config) if encoder == "t5" else (CLIPTextModelWithProjection, CLIPTextConfig)
    )
    part = ENCODER_PARTS[encoder][1]
    model: nn.Module = _empty(base, part, lambda config: model_class(config_class.from_dict(config)).to(dtype))
    if dtype is torch.float16:  # transformers then keeps these layers in fp32, as T5's would overflow
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in (model_class._keep_in_fp32_modules or ()):
                module.float()
    return model


def load_scheduler(base: Base, shift: float | None = None) -> FlowMatchEulerDiscreteScheduler:
    """Load the scheduler, with the base's own shift unless one is given."""
    folder = base.folder("scheduler")
    base.config("scheduler")
    other = {} if shift is None else {"shift": shift}
    return _reading(
        folder, lambda: FlowMatchEulerDiscreteScheduler.from_pretrained(folder, local_files_only=True, **other)
    )


def load_text_encoder(
    base: Base, encoder: str, dtype: torch.dtype, device: Device = "cpu", max_sequence_length: int = 256
) -> TextEncoder:
    """Load a text encoder (`clip_l`, `clip_g` or `t5`) with its tokenizer.

    `max_sequence_length` is T5's length in tokens; CLIP always has 77. On the meta device there is no tokenizer.
    """
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    if _is_meta(device):
        return TextEncoder(encoder, None, text_encoder_shape(base, encoder, dtype), max_sequence_length)
    tokenizer = load_tokenizer(base, encoder)
    model_class = T5EncoderModel if encoder == "t5" else CLIPTextModelWithProjection
    model = _load_model(model_class, base, ENCODER_PARTS[encoder][1], dtype, device)
    length = max_sequence_length if encoder == "t5" else tokenizer.model_max_length
    return TextEncoder(encoder, tokenizer, model, length)


def load_tokenizer(base: Base, encoder: str) -> Any:
    """Load the tokenizer of `clip_l`, `clip_g` or `t5`."""
    from transformers import CLIPTokenizer, T5TokenizerFast

    tokenizer_class = T5TokenizerFast if encoder == "t5" else CLIPTokenizer
    folder = base.folder(ENCODER_PARTS[encoder][0])
    return _reading(folder, lambda: tokenizer_class.from_pretrained(folder, local_files_only=True))


def load_pipeline(base: Base, dtype: torch.dtype, device: Device = "cpu", t5: bool = True) -> StableDiffusion3Pipeline:
    """Load the whole base as diffusers' pipeline, in one dtype; without T5 its embeddings are zeros."""
    from diffusers import StableDiffusion3Pipeline

    encoders = {name: load_text_encoder(base, name, dtype, device) for name in ENCODER_PARTS if t5 or name != "t5"}
    parts = {
        part: getattr(encoders[name], attribute) if name in encoders else None
        for name, names in ENCODER_PARTS.items()
        for part, attribute in zip(names, ("tokenizer", "model"), strict=True)
    }
    return StableDiffusion3Pipeline(
        transformer=load_transformer(base, dtype, device),
        vae=load_vae(base, dtype, device),
        scheduler=load_scheduler(base),
        **parts,
    )


def _is_meta(device: Device) -> bool:
    return torch.device(device).type == "meta"


def _cast(model: Model, dtype: torch.dtype) -> Model:
    """Return `model.to(dtype)`, without diffusers' warning about layers that need a higher precision."""
    nn.Module.to(model, dtype)
    return model


def transformer_config(base: Base) -> dict[str, Any]:
    """Return the transformer's `config.json`; no weights are read or downloaded."""
    return base.config("transformer")


def vae_config(base: Base) -> dict[str, Any]:
    """Return the VAE's `config.json`; no weights are read or downloaded."""
    return base.config("vae")


def empty_transformer(base: Base) -> SD3Transformer2DModel:
    """Return the transformer without weights, on the meta device: modules, names and shapes only."""
    return _empty(base, "transformer", SD3Transformer2DModel.from_config)


def _empty(base: Base, part: str, build: Callable[[dict[str, Any]], Model]) -> Model:
    """Build a part without weights, on the meta device, from its configuration."""
    config = base.config(part)
    with torch.device("meta"):
        model = _reading(base.path, lambda: build(config))
    return model.eval().requires_grad_(False)


def _load_model(model_class: type[Model], base: Base, part: str, dtype: torch.dtype, device: Device) -> Model:
    in_file = base.in_file(part)
    base.config(part)  # checks the limits before anything is built
    with no_progress_bars():
        if in_file is not None:
            files, where = {}, str(in_file.file)
            model, problems = _reading(in_file.file, lambda: from_file(model_class, in_file, dtype))
        else:
            folder = base.folder(part)
            files = {name: file for file in weight_files(folder) for name in tensor_headers(file)}
            where = f"{folder} ({', '.join(sorted({file.name for file in files.values()}))})"
            model, problems = _reading(folder, lambda: _from_folder(model_class, folder, dtype))
    for kind, keys in problems.items():
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise ModelError(f"{where}: weights that its config makes {kind}: {', '.join(sorted(keys)[:3])}{more}")
    frozen: Model = model.to(device).eval().requires_grad_(False)
    _check_finite(frozen, files, where)
    return frozen


def _from_folder(model_class: Any, folder: Path, dtype: torch.dtype) -> tuple[Any, dict[str, list[str]]]:
    """Return the model, and kind -> the weights that do not fit its `config.json`."""
    diffusers_model = issubclass(model_class, ModelMixin)
    options = {"torch_dtype": dtype} if diffusers_model else {"dtype": dtype, "ignore_mismatched_sizes": True}
    with without_tables() if diffusers_model else nullcontext():
        model, info = model_class.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, output_loading_info=True, **options
        )
    kinds = ["missing", "mismatched"] + (["unexpected"] if model_class is SD3Transformer2DModel else [])
    return model, {kind: [str(key) for key in info[f"{kind}_keys"]] for kind in kinds}


def _check_finite(model: nn.Module, files: dict[str, Path], where: str) -> None:
    """Raise ModelError for NaN or infinity, found from the extremes of each tensor without a temporary of its size."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    extremes = torch.stack([torch.stack(torch.aminmax(tensor)).float() for tensor in tensors.values()])
    finite = extremes.cpu().isfinite().all(dim=1).tolist()
    for name, good in zip(tensors, finite, strict=True):
        if not good:
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            raise ModelError(f"{files.get(name, where)}: NaN or infinity in {name} (loaded as {dtype})")


def _reading(path: Path, load: Callable[[], Loaded]) -> Loaded:
    """Run a library's loader, and turn any error about a broken file into a ModelError that names the path."""
    try:
        return load()
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{path}: cannot be loaded: {reason}") from error
