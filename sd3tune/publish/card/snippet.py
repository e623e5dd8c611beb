"""Code for diffusers, which runs in the repository's folder and draws the same picture as the `infer` command."""

from __future__ import annotations

from collections.abc import Sequence

from sd3tune.adapter.embedding import EMBEDDING_FILE
from sd3tune.adapter.file import ADAPTER_FILE
from sd3tune.publish.card.markdown import code, fenced
from sd3tune.publish.card.trained import Trained


def with_diffusers(trained: Trained) -> list[str]:
    """Return the paragraphs, or one with the reason if diffusers cannot load the base."""
    base = _loading_base(trained)
    if base is None:
        return [
            "diffusers alone cannot draw with it as it was trained: it needs the base as a folder in its own layout, "
            "and the base was one file."
        ]
    return [
        _introduction(trained),
        fenced("python", "\n".join([*_with_imports(base, trained), *_loading_adapter(trained), *_drawing(trained)])),
    ]


def _with_imports(lines: Sequence[str], trained: Trained) -> list[str]:
    """Return the lines with the imports that LoHa also needs, after diffusers'."""
    if trained.kind_of_adapter != "LoHa":
        return list(lines)
    place = next(number for number, line in enumerate(lines) if line.startswith("from diffusers")) + 1
    first = ["import json"] if lines[0].startswith("import ") and lines[0] != "import torch" else ["import json", ""]
    return [*first, *lines[:place], *_for_loha(trained), *lines[place:]]


def _introduction(trained: Trained) -> str:
    base, kind = code(trained.contract["base"]), trained.contract["base_kind"]
    if not trained.is_for_a_base:
        return "Or with diffusers alone:"
    if kind in ("tiny", "nano"):
        return f"Or with diffusers; {base} comes with sd3tune:"
    beside = f", beside {base}" if kind in ("folder", "file") else ""
    others = " (the text encoders are then not the files that it was trained with)" * bool(trained.encoder_files)
    return f"Or with diffusers alone{beside}{others}:"


def _loading_base(trained: Trained) -> list[str] | None:
    """Return the lines up to a `pipe` without adapter; None if diffusers cannot load the base."""
    if not trained.is_for_a_base:
        return _loading_model(trained)
    contract, name = trained.contract, trained.contract["base"]
    if contract["base_kind"] in ("tiny", "nano"):
        found = [f'command = [sys.executable, "-m", "sd3tune", "base", "path", {_python(name)}]']
        found += ["base = subprocess.check_output(command, text=True).strip()"]
        return [*_imports(["subprocess", "sys"], more=_more(trained)), *found, _pipe("base", trained)]
    if contract["base_kind"] != "file":
        return [*_imports(more=_more(trained)), _pipe(_python(name), trained)]
    released = contract["base_released_as"]
    if released is None:
        return None
    transformer = (
        "transformer = SD3Transformer2DModel.from_single_file("
        f'{_python(name)}, config={_python(released)}, subfolder="transformer", dtype=dtype)'
    )
    imports = _imports(classes=["SD3Transformer2DModel", "StableDiffusion3Pipeline"], more=_more(trained))
    return [*imports, transformer, _pipe(_python(released), trained, ["transformer=transformer"])]


def _loading_model(trained: Trained) -> list[str]:
    if trained.repo_id is None:
        return [*_imports(), _pipe('"model"', trained)]
    fetched = f'folder = snapshot_download({_python(trained.repo_id)}, allow_patterns="model/*")'
    imports = _imports(more=["from huggingface_hub import snapshot_download"])
    return [*imports, fetched, _pipe('f"{folder}/model"', trained)]


def _imports(
    modules: Sequence[str] = (), classes: Sequence[str] = ("StableDiffusion3Pipeline",), more: Sequence[str] = ()
) -> list[str]:
    return [
        *(f"import {module}" for module in modules),
        *([""] if modules else []),
        "import torch",
        f"from diffusers import {', '.join(classes)}",
        *more,
        "",
        'device = "cuda" if torch.cuda.is_available() else "cpu"',
        'dtype = torch.bfloat16 if device == "cuda" else torch.float32',
    ]


def _more(trained: Trained) -> list[str]:
    """Return the imports that loading an embedding needs."""
    if trained.learned is None:
        return []
    hub = ["from huggingface_hub import hf_hub_download"] if trained.repo_id else []
    return [*hub, "from safetensors.torch import load_file"]


def _pipe(base: str, trained: Trained, more: Sequence[str] = ()) -> str:
    without = [] if trained.uses_t5 else ["text_encoder_3=None", "tokenizer_3=None"]
    arguments = ", ".join([base, "dtype=dtype", *more, *without])
    return f"pipe = StableDiffusion3Pipeline.from_pretrained({arguments}).to(device)"


def _loading_adapter(trained: Trained) -> list[str]:
    embedding = _loading_embedding(trained) if trained.learned is not None else []
    if not trained.is_adapter:
        return embedding
    if trained.kind_of_adapter == "LoHa":
        return _loading_loha(trained)
    where = f'{_python(trained.repo_id)}, subfolder="adapter"' if trained.repo_id else '"adapter"'
    loads = "transformer.load_lora_adapter" if trained.kind_of_adapter == "LoKr" else "load_lora_weights"
    return [f'pipe.{loads}({where}, weight_name="{ADAPTER_FILE}")', *embedding]


def _loading_loha(trained: Trained) -> list[str]:
    """Return lines that load the file by PEFT: diffusers itself reads no LoHa."""
    path = f"adapter/{ADAPTER_FILE}"
    found = f'hf_hub_download({_python(trained.repo_id)}, "{path}")' if trained.repo_id else f'"{path}"'
    return [
        f'with safe_open({found}, "pt", device=device) as file:',
        '    stated = json.loads(file.metadata()["lora_adapter_metadata"])',
        '    tensors = {key.removeprefix("transformer."): file.get_tensor(key) for key in file.keys()}',
        'settings = {key.removeprefix("transformer."): value for key, value in stated.items()}',
        "pipe.transformer.add_adapter(LoHaConfig(**settings))",
        "set_peft_model_state_dict(pipe.transformer, tensors)",
    ]


def _for_loha(trained: Trained) -> list[str]:
    hub = ["from huggingface_hub import hf_hub_download"] if trained.repo_id else []
    return [*hub, "from peft import LoHaConfig, set_peft_model_state_dict", "from safetensors import safe_open"]


def _loading_embedding(trained: Trained) -> list[str]:
    """Return the code that adds the tokens and their rows: the pipeline for SD3 loads no embeddings itself."""
    file = f'"{trained.folder}/{EMBEDDING_FILE}"'
    where = f"hf_hub_download({_python(trained.repo_id)}, {file})" if trained.repo_id else file
    return [
        "",
        f"rows = load_file({where})",
        f"names = [{', '.join(map(_python, trained.token_names))}]",
        'encoders = {"clip_l": (pipe.tokenizer, pipe.text_encoder), "clip_g": (pipe.tokenizer_2, pipe.text_encoder_2)}',
        "for name, (tokenizer, encoder) in encoders.items():",
        "    tokenizer.add_tokens(names)",
        "    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)",
        "    table = encoder.get_input_embeddings().weight.data",
        "    table[-len(names) :] = rows[name].to(table)",
        "    encoder.text_model.eos_token_id = tokenizer.eos_token_id  # where the pooled vector is taken",
        "",
    ]


def _prompt(trained: Trained) -> list[str]:
    """Return the prompt's arguments. A learned token is written out for CLIP, and T5 reads other words."""
    prompt = trained.drawing.prompt
    if trained.learned is None:
        return [f"    {_python(prompt)},"]
    token, words = trained.learned["token"], trained.learned["t5_caption"]
    for_t5 = [f"    prompt_3={_python(prompt.replace(token, words))},"] if trained.uses_t5 else []
    return [f"    {_python(prompt.replace(token, ' '.join(trained.token_names)))},", *for_t5]


def _drawing(trained: Trained) -> list[str]:
    """Return the code that draws the same picture as the `infer` command."""
    drawing = trained.drawing
    length = trained.contract["max_sequence_length"]
    width, height = _sides(trained)
    noise, arguments = _starting_noise(trained)
    return [
        *noise,
        "image = pipe(",
        *_prompt(trained),
        f"    max_sequence_length={length},",
        f"    height={height},",
        f"    width={width},",
        f"    num_inference_steps={drawing.steps},",
        f"    guidance_scale={drawing.guidance},",
        *_guiding(trained),
        *arguments,
        ").images[0]",
        'image.save("image.png")',
    ]


def _sides(trained: Trained) -> tuple[int, int]:
    """Return (width, height) of the example."""
    side = trained.contract["resolution"]
    width, height = trained.drawing.size or (side, side)
    return width, height


def _guiding(trained: Trained) -> list[str]:
    drawing = trained.drawing
    lines = [f"    negative_prompt={_python(drawing.negative)},"] if drawing.negative else []
    if drawing.slg is not None:
        lines += [
            f"    skip_guidance_layers={list(drawing.slg['layers'])},",
            f"    skip_layer_guidance_scale={drawing.slg['scale']},",
            f"    skip_layer_guidance_start={drawing.slg['start']},",
            f"    skip_layer_guidance_stop={drawing.slg['stop']},",
        ]
    return lines


def _starting_noise(trained: Trained) -> tuple[list[str], list[str]]:
    """Return lines before the call and its arguments; the numbers equal `sampling.sampler.add_offset`."""
    seed, strength = trained.drawing.seed, trained.contract.get("sampler_noise_offset", 0.0)
    if not strength:
        return [], [f"    generator=torch.Generator().manual_seed({seed}),"]
    width, height = _sides(trained)
    return [
        f"shape = (1, pipe.transformer.config.in_channels, {height // 8}, {width // 8})",
        f"noise = torch.randn(shape, generator=torch.Generator().manual_seed({seed}), dtype=dtype)",
        f"offset = torch.randn(shape[:2], generator=torch.Generator().manual_seed({2**63 - 1 - seed}))",
    ], [f"    latents=(noise + {strength!r} * offset[..., None, None]).to(dtype),"]


def _python(text: str) -> str:
    """Return a string literal, in double quotes if that needs no escapes."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal
