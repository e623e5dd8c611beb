"""Encoders in transformers' format: DINO and DINOv2, CLIP and SigLIP, from the Hub or a local folder."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from sd3tune.errors import MeasureUnavailable, ModelError
from sd3tune.measures.encoders import NANO_CLIP, EncoderSpec, ImageEncoder
from sd3tune.model.base import pretrained as models
from sd3tune.model.base.offline import NANO


class Pretrained:
    """The features of a self-supervised vision transformer: its class token after the last norm.

    Pictures are resized, cropped and normalised as the model's own preprocessor states, by Pillow, and pass the model
    one at a time, in fp32. So features depend neither on the order nor on the number of pictures.
    """

    def __init__(self, spec: EncoderSpec, model: nn.Module, preprocess: Any) -> None:
        self.name = spec.name
        self.source = spec.label
        self.model: Any = model
        self._preprocess = preprocess
        self._device = next(model.parameters()).device

    def images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Return features [n, d], fp32 on the CPU, of unit length."""
        return self._features(self._image, [picture.convert("RGB") for picture in pictures])

    def _features(self, encode: Callable[[Any], Tensor], inputs: Sequence[Any]) -> Tensor:
        if not inputs:
            raise ValueError(f"{self.name}: nothing to encode")
        # In TF32, the default of convolutions on a GPU, features would differ from those of a CPU.
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            features = torch.cat([encode(one).float().cpu() for one in inputs])
        if not features.isfinite().all():
            raise MeasureUnavailable(f"{self.name}: {self.source}: features are not finite; check its weights")
        return nn.functional.normalize(features.double(), dim=1).float()

    def _image(self, picture: Image.Image) -> Tensor:
        """Return the features of a picture: [1, d], of any length."""
        features: Tensor = self.model(pixel_values=self._pixels(picture)).last_hidden_state[:, 0]
        return features

    def _pixels(self, picture: Image.Image) -> Tensor:
        pixels: Tensor = self._preprocess(images=picture, return_tensors="pt")["pixel_values"]
        return pixels.to(self._device)


class PretrainedWithText(Pretrained):
    """The projected features of a model with an image and a text encoder, such as CLIP."""

    def __init__(self, spec: EncoderSpec, model: Any, preprocess: Any, tokenizer: Any) -> None:
        super().__init__(spec, model, preprocess)
        self._tokenizer = tokenizer
        self._length = model.config.text_config.max_position_embeddings

    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Return features [n, d], fp32 on the CPU, of unit length. Tokens past the model's length are left out."""
        return self._features(self._text, prompts)

    def _image(self, picture: Image.Image) -> Tensor:
        return _projected(self.model.get_image_features(pixel_values=self._pixels(picture)))

    def _text(self, prompt: str) -> Tensor:
        tokens = self._tokenizer(
            prompt, padding="max_length", max_length=self._length, truncation=True, return_tensors="pt"
        )
        return _projected(self.model.get_text_features(**tokens.to(self._device)))


@contextmanager
def pretrained(spec: EncoderSpec, device: torch.device) -> Iterator[ImageEncoder]:
    """Load an encoder, and free its weights at the end, even if the caller keeps it. Raises MeasureUnavailable."""
    folder = folder_of(spec)
    try:
        encoder = _load(spec, folder, device)
    except ModelError as error:
        raise MeasureUnavailable(*(f"{spec.name}: {problem}" for problem in error.problems)) from None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = " ".join(str(error).split())[:300]
        raise MeasureUnavailable(
            f"{spec.name}: {spec.label}: cannot be loaded: {type(error).__name__}: {reason}; name another folder, "
            "in transformers' format"
        ) from error
    try:
        yield encoder
    finally:
        encoder.model = nn.Identity()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def folder_of(spec: EncoderSpec) -> Path:
    """Return the folder of an encoder, downloaded if needed. Raises MeasureUnavailable."""
    try:
        return _folder(spec)
    except ModelError as error:
        raise MeasureUnavailable(*(f"{spec.name}: {problem}" for problem in error.problems)) from None


def _folder(spec: EncoderSpec) -> Path:
    if spec.source == NANO and spec.revision is None and NANO_CLIP.exists():
        return NANO_CLIP
    if spec.source == NANO:
        raise ModelError("not in this installation of sd3tune; install it again, or choose another encoder")
    source = models.ModelSource(spec.source, spec.revision)
    return models.folder_of(source, f"name a local folder: --encoder {spec.name}=FOLDER")


def _load(spec: EncoderSpec, folder: Path, device: torch.device) -> Pretrained:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with models.quiet_transformers():
        config = AutoConfig.from_pretrained(folder, **local)
        # Checkpoints of DINO lack this layer, which would get random weights.
        options = {"add_pooling_layer": False} if config.model_type == "vit" else {}
        model, info = AutoModel.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **local, **options
        )
        if info["missing_keys"]:
            raise ModelError(f"{spec.label}: tensor {min(info['missing_keys'])} is missing in its weights")
        model = model.to(device).eval().requires_grad_(False)
        preprocess = AutoImageProcessor.from_pretrained(folder, **local, **_with_pillow())
        if not hasattr(model, "get_text_features"):
            return Pretrained(spec, model, preprocess)
        return PretrainedWithText(spec, model, preprocess, AutoTokenizer.from_pretrained(folder, **local))


def _with_pillow() -> dict[str, Any]:
    """Return the option that selects Pillow for resizing, as the models were trained and measured with."""
    import transformers

    return {"use_fast": False} if transformers.__version__.startswith("4.") else {"backend": "pil"}


def _projected(output: Any) -> Tensor:
    """Return the projected features, which transformers 5 puts into an output with their hidden states."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return features
