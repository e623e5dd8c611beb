"""What both commands print."""

from __future__ import annotations

from pathlib import Path

from sd3tune.invocation import command_line


def count(number: int, noun: str) -> str:
    """Return a number with its noun: `1 photo`, `3 photos`."""
    return f"{number} {noun}{'s' * (number != 1)}"


def next_commands(folder: Path, recursive: bool) -> list[str]:
    """Return lines with the commands that check the photos of a folder, and that write a configuration for them."""
    overrides = ["data.sources.0.recursive=true"] if recursive else []
    note = "   # and set recursive: true in it" if recursive else ""
    return [
        f"  {command_line('sd3tune', 'data', 'check', str(folder), *overrides)}",
        f"  {command_line('sd3tune', 'config', 'new', 'mine', '--data', str(folder))}{note}",
    ]
