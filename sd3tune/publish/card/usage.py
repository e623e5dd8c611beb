"""The section on usage: the command, and the code for diffusers."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from sd3tune.adapter.embedding import EMBEDDING_FILE
from sd3tune.adapter.file import ADAPTER_FILE
from sd3tune.publish.card.licences import licence_of
from sd3tune.publish.card.markdown import code, fenced
from sd3tune.publish.card.snippet import with_diffusers
from sd3tune.publish.card.trained import Trained
from sd3tune.publish.files import ADAPTERS
from sd3tune.publish.previews import guiding_options


def usage_section(trained: Trained) -> str:
    shown = ["These settings drew the first picture above."] if trained.drew_first_sample else []
    sections = [*shown, *_gate(trained), *_commands(trained), *with_diffusers(trained), *_other_tools(trained)]
    return "\n\n".join(["## Use it", *sections])


def _gate(trained: Trained) -> list[str]:
    """Return the note on accepting the licence, for gated bases on the Hub."""
    base, licence = trained.contract["base"], licence_of(trained.contract)
    if not trained.is_for_a_base or licence is None or licence.link is None:
        return []
    page = f"[its page](https://huggingface.co/{base})"
    return [f"The base is loaded from the Hub, once its licence was accepted on {page} and `hf auth login` has run."]


def _other_tools(trained: Trained) -> list[str]:
    where = f"`{trained.folder}/{EMBEDDING_FILE}`, copied to `models/embeddings/NAME.safetensors`"
    token = [f"ComfyUI reads {where}, as `embedding:NAME` in the prompt."] if trained.learned is not None else []
    if not trained.is_adapter:
        return token
    file = f"{ADAPTERS[0]}/{ADAPTER_FILE}"
    both = " It adapts text encoders, too: connect CLIP to `Load LoRA`." if trained.trained_encoders else ""
    if trained.kind_of_adapter != "DoRA":
        return [f"ComfyUI reads `{file}` as it is.{both}", *token]
    command = f"sd3tune lora convert {file} --to comfyui --out for_comfyui.safetensors"
    return [f"ComfyUI would ignore the magnitudes in this file; {code(command)} writes one for it.{both}"]


def _commands(trained: Trained) -> list[str]:
    words = ["sd3tune", "infer", *_infer_arguments(trained), *_drawing_arguments(trained)]
    lines = [*_download(trained), shlex.join(words)]
    return [_where(trained), fenced("bash", "\n".join(lines))]


def _where(trained: Trained) -> str:
    if trained.repo_id is None:
        return "In this folder:"
    if trained.is_adapter and trained.base_is_local:
        kept = ", ".join(code(name) for name in _files_of_base(trained))
        return f"With {code('config.yaml')} of this repository and, beside it, {kept}:"
    return "With sd3tune, from anywhere:"


def _files_of_base(trained: Trained) -> list[str]:
    base = [trained.contract["base"]] if trained.contract["base_kind"] in ("folder", "file") else []
    return [*base, *trained.encoder_files]


def _download(trained: Trained) -> list[str]:
    """Return the download of a whole model or an embedding: `infer` takes their folders."""
    if trained.is_adapter or trained.repo_id is None:
        return []
    return [shlex.join(["hf", "download", trained.repo_id, "--include", f"{trained.folder}/*", "--local-dir", "."])]


def _infer_arguments(trained: Trained) -> list[str]:
    if trained.is_embedding:
        return ["--embedding", "."]
    if not trained.is_adapter:
        return ["--base", "model"]
    config = ["--config", "config.yaml"] if trained.repo_id and trained.base_is_local else []
    return ["--lora", trained.repo_id or ".", *config]


def _drawing_arguments(trained: Trained) -> Iterator[str]:
    drawing = trained.drawing
    yield from ("--prompt", drawing.prompt)
    usual = trained.default_drawing(drawing.prompt)
    for name in ("steps", "guidance", "seed"):
        value = getattr(drawing, name)
        if value != getattr(usual, name):
            yield from (f"--{name}", f"{value}")
    yield from guiding_options(vars(drawing))
