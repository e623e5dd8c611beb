"""How to draw with what was trained: the command, and code that runs as it stands where its files are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from sd3tune.model.adapter_io import ADAPTER_FILE
from sd3tune.publish.card.markdown import code, fenced
from sd3tune.publish.card.trained import Drawing, Trained


def usage_section(trained: Trained) -> str:
    shown = ["This is how the first of the pictures above was drawn."] if trained.shows_itself else []
    return "\n\n".join(["## Use it", *shown, *_commands(trained), *_diffusers(trained)])


# sd3tune


def _commands(trained: Trained) -> list[str]:
    words = ["sd3tune", "infer", *_infer_arguments(trained), *_drawing_arguments(trained.drawing)]
    lines = [*_download(trained), shlex.join(words)]
    return [_where(trained), fenced("bash", "\n".join(lines))]


def _where(trained: Trained) -> str:
    if trained.repo_id is None:
        return "In this folder:"
    if trained.adapts and trained.base_is_here:
        kept = ", ".join(code(name) for name in _files_of_base(trained))
        return f"With {code('config.yaml')} of this repository and, beside it, {kept}:"
    return "With sd3tune, from anywhere:"


def _files_of_base(trained: Trained) -> list[str]:
    base = [trained.contract["base"]] if trained.contract["base_kind"] in ("folder", "file") else []
    return [*base, *_encoder_files(trained)]


def _encoder_files(trained: Trained) -> list[str]:
    return [used["file"] for used in trained.contract.get("encoder_files", {}).values()]


def _download(trained: Trained) -> list[str]:
    """A whole model lies in a folder of the repository, which the Hub's libraries do not load from by its id."""
    if trained.adapts or trained.repo_id is None:
        return []
    return [shlex.join(["hf", "download", trained.repo_id, "--include", "model/*", "--local-dir", "."])]


def _infer_arguments(trained: Trained) -> list[str]:
    if not trained.adapts:
        return ["--base", "model"]
    told = ["--config", "config.yaml"] if trained.repo_id and trained.base_is_here else []
    return ["--lora", trained.repo_id or ".", *told]


def _drawing_arguments(drawing: Drawing) -> Iterator[str]:
    yield from ("--prompt", drawing.prompt)
    usual = Drawing(drawing.prompt)
    for name in ("steps", "guidance", "seed"):
        value = getattr(drawing, name)
        if value != getattr(usual, name):
            yield from (f"--{name}", f"{value}")


# diffusers


def _diffusers(trained: Trained) -> list[str]:
    base = _loading_base(trained)
    if base is None:
        return [
            "diffusers alone cannot draw with it as it was trained: it wants the base as a folder in its own layout, "
            "and the base was one file."
        ]
    return [
        _introduction(trained),
        fenced("python", "\n".join([*base, *_loading_adapter(trained), *_drawing(trained)])),
    ]


def _introduction(trained: Trained) -> str:
    base, kind = code(trained.contract["base"]), trained.contract["base_kind"]
    if not trained.adapts:
        return "Or with diffusers alone:"
    if kind in ("tiny", "nano"):
        return f"Or with diffusers; {base} comes with sd3tune:"
    beside = f", beside {base}" if kind in ("folder", "file") else ""
    others = " (the text encoders are then not the files that it was trained with)" * bool(_encoder_files(trained))
    return f"Or with diffusers alone{beside}{others}:"


def _loading_base(trained: Trained) -> list[str] | None:
    """Lines up to a `pipe` without an adapter; None where diffusers cannot be told to load the base."""
    if not trained.adapts:
        return _loading_model(trained)
    contract, name = trained.contract, trained.contract["base"]
    if contract["base_kind"] in ("tiny", "nano"):
        found = [f'command = [sys.executable, "-m", "sd3tune", "base", "path", {_python(name)}]']
        found += ["base = subprocess.check_output(command, text=True).strip()"]
        return [*_imports(["subprocess", "sys"]), *found, _pipe("base", trained)]
    if contract["base_kind"] != "file":
        return [*_imports(), _pipe(_python(name), trained)]
    released = contract["base_released_as"]
    if released is None:
        return None
    transformer = (
        "transformer = SD3Transformer2DModel.from_single_file("
        f'{_python(name)}, config={_python(released)}, subfolder="transformer", dtype=dtype)'
    )
    imports = _imports(classes=["SD3Transformer2DModel", "StableDiffusion3Pipeline"])
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


def _pipe(base: str, trained: Trained, more: Sequence[str] = ()) -> str:
    without = [] if trained.uses_t5 else ["text_encoder_3=None", "tokenizer_3=None"]
    arguments = ", ".join([base, "dtype=dtype", *more, *without])
    return f"pipe = StableDiffusion3Pipeline.from_pretrained({arguments}).to(device)"


def _loading_adapter(trained: Trained) -> list[str]:
    if not trained.adapts:
        return []
    where = f'{_python(trained.repo_id)}, subfolder="adapter"' if trained.repo_id else '"adapter"'
    return [f'pipe.load_lora_weights({where}, weight_name="{ADAPTER_FILE}")']


def _drawing(trained: Trained) -> list[str]:
    """The same picture as the command's."""
    drawing = trained.drawing
    side, length = trained.contract["resolution"], trained.contract["max_sequence_length"]
    return [
        "image = pipe(",
        f"    {_python(drawing.prompt)},",
        f"    max_sequence_length={length},",
        f"    height={side},",
        f"    width={side},",
        f"    num_inference_steps={drawing.steps},",
        f"    guidance_scale={drawing.guidance},",
        f"    generator=torch.Generator().manual_seed({drawing.seed}),",
        ").images[0]",
        'image.save("image.png")',
    ]


def _python(text: str) -> str:
    """A literal, in double quotes where that needs no escapes."""
    literal = repr(text)
    return f'"{literal[1:-1]}"' if literal[0] == "'" and '"' not in literal else literal
