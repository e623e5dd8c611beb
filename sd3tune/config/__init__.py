"""The configuration of a run: a strict schema, a loader with readable errors, and a YAML dump. Imports no torch."""

from sd3tune.config.dump import dump_config
from sd3tune.config.json_schema import json_schema
from sd3tune.config.loader import LoadedConfig, load_config, parse_config
from sd3tune.config.schema import CONFIG_VERSION, Config
from sd3tune.config.sections.model import ModelConfig

__all__ = [
    "CONFIG_VERSION",
    "Config",
    "LoadedConfig",
    "ModelConfig",
    "dump_config",
    "json_schema",
    "load_config",
    "parse_config",
]
