"""Vision-language models in transformers' format, which describe pictures."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from sd3tune.errors import ModelError
from sd3tune.model.base.pretrained import ModelSource, quiet_transformers
from sd3tune.reporting import loading
from sd3tune.runtime.out_of_memory import is_out_of_memory

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


@contextmanager
def loaded_captioner(
    source: ModelSource, folder: Path, device: torch.device, dtype: torch.dtype
) -> Iterator[Captioner]:
    """Load the model in `folder`, and free it at the end. Raises ModelError, in one line with the way out."""
    try:
        with loading(f"loading {source.label}"):
            captioner = _load(source, folder, device, dtype)
    except ModelError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{source.label}: cannot be loaded: {type(error).__name__}: {reason}; name another model with --model"
        ) from error
    try:
        yield captioner
    finally:
        captioner.model = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _load(source: ModelSource, folder: Path, device: torch.device, dtype: torch.dtype) -> Captioner:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with quiet_transformers():
        processor = AutoProcessor.from_pretrained(folder, **local)
        if not getattr(processor, "chat_template", None):
            raise ModelError(
                f"{source.label}: has no chat template, so it follows no instructions; name an instruction-tuned "
                "vision-language model with --model"
            )
        model, info = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, **local
        )
    if info["missing_keys"]:
        raise ModelError(f"{source.label}: tensor {min(info['missing_keys'])} is missing in its weights")
    return Captioner(model.to(device).eval().requires_grad_(False), processor)
