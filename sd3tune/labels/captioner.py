"""Vision-language models in transformers' format, which describe pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sd3tune.errors import ModelError
from sd3tune.labels.loading import ONLY_HERE, checked
from sd3tune.model.base.pretrained import ModelSource, quiet_transformers

CAPTIONER = ModelSource("Qwen/Qwen3-VL-2B-Instruct", "89644892e4d85e24eaac8bacfd4f463576704203")
"""2.1 billion parameters, Apache-2.0; 4.3 GB. Decision 40 has the reasons."""
LONGEST_SIDE = 1024
"""Pixels: a larger picture is scaled down. The default model reads 1024 x 1024 pixels as 1024 tokens."""
MOST_TOKENS = 120
"""Limit on an answer, in tokens of the model."""
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class Answer:
    """What a model says of a picture."""

    text: str
    complete: bool
    """False if the limit of tokens ended it."""


class Captioner:
    """A vision-language model with its processor. It decodes greedily, one picture at a time."""

    def __init__(self, model: Any, processor: Any, most_tokens: int = MOST_TOKENS) -> None:
        from transformers import GenerationConfig

        stated = model.generation_config
        ends = stated.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends])
        ids = {name: getattr(stated, name) for name in _TOKEN_IDS}
        ids["pad_token_id"] = next((one for one in (ids["pad_token_id"], *self._ends) if one is not None), None)
        # Its own settings may sample, and the settings of a call only complete them.
        model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=most_tokens, **ids)
        self.model = model
        self._processor = processor

    def describe(self, picture: Image.Image, instruction: str) -> Answer:
        """Return the answer to an instruction on an RGB picture."""
        picture = picture.copy()
        picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
        content = [{"type": "image", "image": picture}, {"type": "text", "text": instruction}]
        with torch.inference_mode(), quiet_transformers():
            inputs = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self.model.device, self.model.dtype)
            tokens = self.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :].tolist()
        text: str = self._processor.decode(tokens, skip_special_tokens=True)
        return Answer(text, complete=bool(tokens) and tokens[-1] in self._ends)


def load_captioner(source: ModelSource, folder: Path, device: torch.device, dtype: torch.dtype) -> Captioner:
    """Load the model in `folder`; call it in `loading.loaded`. Raises ModelError for a model without instructions."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder, **ONLY_HERE)
    if not getattr(processor, "chat_template", None):
        raise ModelError(
            f"{source.label}: has no chat template, so it follows no instructions; name an instruction-tuned "
            "vision-language model with --model"
        )
    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, **ONLY_HERE
    )
    return Captioner(checked(source, model, info, device), processor)
