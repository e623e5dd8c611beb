"""A small Qwen3-VL and a small CLIPSeg with random weights, in folders as transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    CLIPSegProcessor,
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    ViTImageProcessor,
)

from tests.measures.small_models import clip_tokenizer

END = "<|im_end|>"
ANSWERS = [f"\u0120{word}" for word in ("sitting", "running", "on", "in", "grass", "snow", "beach", "garden", "light")]
"""The tokens that an answer has, each a word with its space."""
_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"
]  # fmt: skip
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As Qwen's own."""


def save_captioner(folder: Path) -> Path:
    """Write a vision-language model that answers with words of `ANSWERS`, and that states sampling, as Qwen's do."""
    torch.manual_seed(1)
    vocabulary = [*sorted(ByteLevel.alphabet()), *ANSWERS, *_SPECIAL]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Qwen2Tokenizer(
        vocab=ids, merges=[], eos_token=END, pad_token="<|endoftext|>", additional_special_tokens=_SPECIAL
    )
    model = Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config={
                "vocab_size": len(ids), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
            },
            vision_config={
                "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8,
                "out_hidden_size": 32, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
            },
            image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
            tie_word_embeddings=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
        spoken = torch.tensor([ids[token] for token in [*ANSWERS, END]])
        scale = torch.full((len(ids), 1), 0.1).index_fill_(0, spoken, 1.0)
        model.get_input_embeddings().weight.mul_(scale)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.7,
        top_k=20,
        top_p=0.8,
        eos_token_id=[ids[END], ids["<|endoftext|>"]],
        pad_token_id=ids["<|endoftext|>"],
    )
    model.save_pretrained(folder)
    sizes = {"patch_size": 8, "merge_size": 2, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
    images, videos = Qwen2VLImageProcessor(**sizes), Qwen3VLVideoProcessor(**sizes)
    Qwen3VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


def save_segmenter(folder: Path) -> Path:
    """Write a CLIPSeg model with the decoder of the refined ones."""
    torch.manual_seed(2)
    tokenizer = clip_tokenizer(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = CLIPSegForImageSegmentation(
        CLIPSegConfig(
            text_config={
                **sizes, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": 16,
                "pad_token_id": tokenizer.pad_token_id,
            },
            vision_config={**sizes, "image_size": 32, "patch_size": 16},
            projection_dim=24, reduce_dim=16, extract_layers=[0, 1], decoder_num_attention_heads=2,
            decoder_intermediate_size=32, use_complex_transposed_convolution=True,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    images = ViTImageProcessor(size={"height": 64, "width": 64})  # as the published ones, larger than the CLIP's own
    CLIPSegProcessor(images, tokenizer).save_pretrained(folder)
    return folder
