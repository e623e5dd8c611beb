"""What the shell completes: configurations, run folders and shipped configurations. It imports no torch."""

from __future__ import annotations

from pathlib import Path


def complete_config(incomplete: str) -> list[str]:
    """Return folders and YAML files that begin as typed, among them the configurations of runs."""
    return _paths(incomplete, (".yaml", ".yml"))


def complete_run(incomplete: str) -> list[str]:
    """Return the run folders that begin as typed, else folders."""
    from sd3tune.commands.runs import run_folders

    return [run for run in run_folders() if run.startswith(incomplete)] or _paths(incomplete, ())


def complete_preset(incomplete: str) -> list[tuple[str, str]]:
    """Return (name, description) of the shipped configurations that begin as typed."""
    from sd3tune.config.presets import all_presets

    return [(preset.name, preset.description) for preset in all_presets() if preset.name.startswith(incomplete)]


def _paths(incomplete: str, endings: tuple[str, ...]) -> list[str]:
    """Return the visible folders, with a slash, and the files with one of `endings` that begin as typed."""
    typed, _, name = incomplete.rpartition("/")
    folder = Path(f"{typed}/" if "/" in incomplete else ".").expanduser()
    shown = f"{typed}/" if "/" in incomplete else ""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return []
    found = [path for path in entries if path.name.startswith(name) and (name or not path.name.startswith("."))]
    kept = [path for path in found if path.is_dir() or path.suffix in endings]
    return [f"{shown}{path.name}" + "/" * path.is_dir() for path in kept]
