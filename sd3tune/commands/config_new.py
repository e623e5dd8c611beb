"""`sd3tune config new`: write a commented YAML from a preset, ready to run."""

from __future__ import annotations

import os
from pathlib import Path

from sd3tune.config.files import short_path
from sd3tune.config.from_preset import UserValues, text_from_preset
from sd3tune.config.loader import load_text
from sd3tune.config.presets import Preset, find_preset
from sd3tune.config.schema import Config
from sd3tune.config.sections.model import OFFLINE_BASES
from sd3tune.errors import ConfigError
from sd3tune.invocation import command_line
from sd3tune.reporting import result, say


def new_config(
    name: str,
    preset: str,
    data: str | None = None,
    caption: str | None = None,
    out: Path | None = None,
) -> Path:
    """Write the YAML, print the next commands and return its path, by default `NAME.yaml`. Raises ConfigError."""
    out = Path(f"{name}.yaml") if out is None else out.expanduser()
    source = Preset(find_preset(preset))
    _check(out, data)
    text = text_from_preset(source, UserValues(name, out, data, caption))
    config = load_text(text, str(out)).config
    if os.path.lexists(out):
        raise ConfigError(f"{out} already exists and is not overwritten; choose another name, or --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error.strerror}") from None
    result(f"{out}: from the preset {source.name}", file=out)
    say("", *_next_steps(config, out))
    return out


def _check(out: Path, data: str | None) -> None:
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name a file in it, such as {out / 'run.yaml'}")
    if data == "":
        raise ConfigError("--data: is empty; name the folder of the images")
    if data is not None and Path(data).expanduser().is_file():
        raise ConfigError(f"--data: {data} is a file; name the folder of the images")


def _next_steps(config: Config, out: Path) -> list[str]:
    source, command = config.data.sources[0], command_line("sd3tune", "train", str(out))
    images = Path(source.path)
    steps = ["next:"]
    if not images.is_dir():
        steps.append(f"  put the images into {short_path(images)}")
    if source.caption is not None:
        steps.append(f"  images without their own caption get {source.caption!r}")
    elif not any(images.glob("*.txt")):
        steps.append("  give each image a caption, in a .txt file with the same name")
    if config.model.base in OFFLINE_BASES:
        return [*steps, f"  {command}"]
    rehearsal = "model.base=tiny data.resolution=256 train.steps=20"
    return [
        *steps,
        f"  {command} {rehearsal} schedule.warmup_steps=0   # on the CPU, without a download",
        f"  {command_line('hf', 'auth', 'login')}   # and accept the licence at https://huggingface.co/{config.model.base}",
        f"  {command}",
    ]
