"""A configuration as YAML that loads back to the same configuration."""

from __future__ import annotations

from typing import Any

import yaml

from sd3tune.config.schema import Config
from sd3tune.config.yaml12 import add_scalars


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or 1.2 would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Plain and single-quoted text loses unusual line breaks in PyYAML; double quotes escape them."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
add_scalars(_Dumper)


def dump_config(config: Config, ascii_only: bool = False) -> str:
    """Every key with its value, in the order of the schema; `load_config` gives back an equal one.

    `ascii_only`: with escapes for all other characters, for a place that may not be read as UTF-8.
    """
    return dump_values(config.model_dump(), ascii_only)


def dump_values(values: dict[str, Any], ascii_only: bool = False) -> str:
    """Nested values as YAML, in their order."""
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=not ascii_only,
        default_flow_style=False,
        width=2**20,
    )


def dump_text(text: str) -> str:
    """A text as a YAML value on one line, in quotes where YAML 1.1 or 1.2 would take it for something else."""
    dumped = yaml.dump(text, Dumper=_Dumper, allow_unicode=True, width=2**20)
    return dumped.removesuffix("...\n").rstrip("\n")
