"""What *Share* shows of a run: its files for the Hub, its results to download, and whether it can be pushed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.adapter.layouts import forms
from sd3tune.config import load_config
from sd3tune.config.run_folder import read_run_file
from sd3tune.config.sections.outputs import HubConfig
from sd3tune.errors import ConfigError, UserError
from sd3tune.publish.files import CARD, CONFIG, files_of_product, files_of_run, pictures_left_out, pictures_of_run
from sd3tune.publish.repository import TOKENS
from sd3tune.ui.products import Source, run_source
from sd3tune.ui.workspace import Workspace

SUFFIX = ".safetensors"
_FOR = {
    "comfyui": ("ComfyUI", "into ComfyUI/models/loras"),
    "kohya": ("kohya_ss, sd-scripts and Automatic1111's heirs", "into their folder of LoRAs"),
    "diffusers": ("diffusers", "for pipe.load_lora_weights"),
    "lycoris": ("LyCORIS", "for tools that read its names"),
}
"""Form -> who reads it, and where its file goes."""


@dataclass(frozen=True)
class Shared:
    """A run in the opened folders."""

    workspace: Workspace
    run: Path

    @classmethod
    def of(cls, workspace: Workspace, text: str) -> Shared:
        """Return the run of a folder. Raises Outside, and ConfigError for a folder without a run."""
        run = workspace.path(text)
        if not read_run_file(run):
            raise ConfigError(f"{text}: not a run folder; choose a run of the list")
        return cls(workspace, run)

    def word(self, path: Path) -> str:
        """Return a path as an argument of a command, where a name such as `--x` would be an option."""
        text = self.workspace.shown(path)
        return f"./{text}" if text.startswith("-") else text

    @property
    def source(self) -> Source:
        return run_source(self.run)

    @property
    def is_finished(self) -> bool:
        return "report" in read_run_file(self.run)

    def hub(self) -> HubConfig:
        """Return the run's settings for the Hub; the defaults if its configuration cannot be read."""
        try:
            return load_config(self.run / CONFIG).config.hub
        except UserError:
            return HubConfig()

    def uploads(self) -> list[dict[str, Any]]:
        """Return name and bytes of each file that `hub push` sends. Raises UserError."""
        return [
            {"name": name, "size": len(content) if isinstance(content, bytes) else content.stat().st_size}
            for name, content in files_of_run(self.run).items()
        ]

    def left_out(self) -> list[str]:
        return pictures_left_out(self.run)

    def results(self) -> dict[str, Path]:
        """Return name -> file of what can be downloaded: weights, converted files, card and pictures.

        The configuration is left out, as it holds paths of this machine; the uploaded one does not.
        """
        converted = {path.name: path for path in sorted(self.run.glob(f"*{SUFFIX}")) if not path.name.startswith(".")}
        found = {**files_of_product(self.run), **converted, CARD: self.run / CARD, **pictures_of_run(self.run)}
        return {name: path for name, path in found.items() if path.is_file() and not path.is_symlink()}

    def new_file(self, weights: str, form: str) -> tuple[Path, Path]:
        """Return the weights to convert and a free name in the run folder. Raises ConfigError."""
        if form not in forms():
            raise ConfigError(f"{form}: one of {', '.join(forms())}")
        offered = self.source.weights
        chosen = next((one for one in offered if self.workspace.shown(one.path) == weights), None)
        if chosen is None or chosen.kind != "adapter":
            raise ConfigError(f"{weights}: no adapter of {self.run.name}; choose one of the list")
        label = "" if chosen is offered[0] else f"-{chosen.label.replace(', ', '-').replace(' ', '-')}"
        stem = f"{self.run.name}{label}-{form}"
        names = (self.run / f"{stem}{number}{SUFFIX}" for number in ("", *(f"-{count}" for count in range(2, 1000))))
        free = next((path for path in names if not os.path.lexists(path)), None)
        if free is None:
            raise ConfigError(f"{self.run.name}: a thousand files are named {stem}; remove some")
        return chosen.path, free


def readers() -> list[dict[str, str]]:
    """Return the forms to convert into, with who reads them; those of other packages by their name."""
    known = [(form, *_FOR[form]) for form in _FOR if form in forms()]
    others = [(form, layout.name, "") for form, layout in forms().items() if form not in _FOR]
    return [{"form": form, "reader": reader, "where": where} for form, reader, where in (*known, *others)]


def token_state() -> dict[str, Any]:
    """Return whether there is a Hub token and what to do if not; never the token itself, and nothing is asked."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return {"ready": False, "text": "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it."}
    if get_token() is None:
        text = "There is no Hub token on this machine. Make one with write access, and give it to `hf auth login`."
        return {"ready": False, "text": text, "link": TOKENS}
    where = "from HF_TOKEN" if os.environ.get("HF_TOKEN") else "from `hf auth login`"
    return {"ready": True, "text": f"There is a Hub token, {where}. Whether it may write is checked before the upload."}
