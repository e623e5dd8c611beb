"""YAML dump of a configuration, which loads back to an equal configuration."""

from __future__ import annotations

from typing import Any

import yaml

from sd3tune.config.schema import Config
from sd3tune.config.yaml12 import add_scalars


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes strings which YAML 1.1 or 1.2 would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, indentless=False)


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    """Represent text; double quotes preserve unusual line breaks, which PyYAML loses in other styles."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
add_scalars(_Dumper)


def dump_config(config: Config, ascii_only: bool = False) -> str:
    """Return every key with its value, in the order of the schema; `load_config` returns an equal configuration.

    With `ascii_only`, other characters are escaped, for output that may not be read as UTF-8.
    """
    return dump_values(config.model_dump(), ascii_only)


def dump_values(values: dict[str, Any], ascii_only: bool = False) -> str:
    """Return nested values as YAML, in their order."""
    return yaml.dump(
        values,
        Dumper=_Dumper,
        sort_keys=False,
        allow_unicode=not ascii_only,
        default_flow_style=False,
        width=2**20,
    )


def dump_text(text: str) -> str:
    """Return a text as a one-line YAML value, quoted if YAML 1.1 or 1.2 would read another type."""
    dumped = yaml.dump(text, Dumper=_Dumper, allow_unicode=True, width=2**20)
    return dumped.removesuffix("...\n").rstrip("\n")


def dump_flow(value: Any) -> str:
    """Return any plain value on one line, collections in brackets and braces."""
    dumped = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, width=2**20, default_flow_style=True, sort_keys=False)
    return dumped.removesuffix("...\n").rstrip("\n")
