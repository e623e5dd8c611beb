"""CLIPSeg, which finds in a picture what a text names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from sd3tune.errors import ModelError
from sd3tune.labels.loading import ONLY_HERE, checked
from sd3tune.model.base.pretrained import ModelSource, quiet_transformers

SEGMENTER = ModelSource("CIDAS/clipseg-rd64-refined", "583b388deb98a04feb3e1f816dcdb8f3062ee205")
"""150 million parameters, Apache-2.0; 0.6 GB. Decision 40 has the reasons."""
LEAST_SIDE = 512
"""Pixels of a picture's shorter side that are enough: the default model sees 352 x 352."""
_RAMP = 0.1
"""Half the range of probabilities that becomes grey."""


@dataclass(frozen=True)
class Found:
    """What a text names, in a picture."""

    mask: Image.Image
    """Mode L: white inside, black outside, grey at the edge."""
    coverage: float
    """Mean of the mask, 0 to 1."""
    likeliest: float
    """The highest probability in the picture."""


class Segmenter:
    """A CLIPSeg model with its processor, in fp32. It reads one picture at a time."""

    def __init__(self, model: Any, processor: Any) -> None:
        self.model = model
        self._processor = processor

    def find(self, picture: Image.Image, prompt: str, size: tuple[int, int], threshold: float) -> Found:
        """Return the mask of `prompt` in an RGB picture, with `size` (height, width).

        A probability of `threshold` becomes a middle grey; greys reach from 0.1 below it to 0.1 above it.
        """
        with torch.inference_mode(), quiet_transformers():
            inputs = self._processor(text=[prompt], images=[picture], truncation=True, return_tensors="pt")
            logits = self.model(**inputs.to(self.model.device)).logits
            # The model sees the whole picture squeezed into a square, so its square maps to the whole picture.
            square = logits.float().sigmoid().reshape(1, 1, *logits.shape[-2:])
            likely = F.interpolate(square, size, mode="bilinear", align_corners=False)[0, 0]
            ramp = min(_RAMP, threshold, 1 - threshold)
            inside = ((likely - threshold) / (2 * ramp) + 0.5).clamp(0, 1)
            levels = (inside * 255).round().to(torch.uint8).cpu().numpy()
        return Found(Image.fromarray(levels), float(np.mean(levels) / 255), float(square.max()))


def load_segmenter(source: ModelSource, folder: Path, device: torch.device) -> Segmenter:
    """Load the model in `folder`; call it in `loading.loaded`. Raises ModelError for another kind of model."""
    from transformers import AutoConfig, AutoProcessor, CLIPSegForImageSegmentation

    kind = AutoConfig.from_pretrained(folder, **ONLY_HERE).model_type
    if kind != "clipseg":
        raise ModelError(f"{source.label}: is a {kind} model; name a CLIPSeg model with --model")
    processor = AutoProcessor.from_pretrained(folder, **ONLY_HERE)
    model, info = CLIPSegForImageSegmentation.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, **ONLY_HERE
    )
    return Segmenter(checked(source, model, info, device), processor)
