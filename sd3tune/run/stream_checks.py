"""The images of a run before anything is encoded: records, or the checked shards of its streams."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sd3tune.config import Config
from sd3tune.config.sections.data import DataConfig, StreamConfig
from sd3tune.data.records import Record, load_records
from sd3tune.data.stream.reader import shards_of
from sd3tune.data.stream.shards import Shard
from sd3tune.errors import ConfigError, DataError
from sd3tune.run.places import store_folder


def load_of(config: Config, warn: Callable[[str], None] = lambda line: None) -> list[Record]:
    """Return the records of a run's sources, none for streams; see `load_records`."""
    if config.data.streams:
        return []
    return load_records(config.data, config.seed, warn=warn, store=store_folder(config))


def check_stream(config: Config, world: int) -> Sequence[Shard]:
    """Return the shards of a run on streams. Raises ConfigError and DataError."""
    problems = []
    if config.method.trains_text:
        problems.append(
            f"method: {config.method.kind} with trained text encoders cannot read streams; train without them"
        )
    if config.model.extra_t5_lengths:
        problems.append("model.extra_t5_lengths: does not apply to streams; leave it out")
    if config.train.epochs is not None:
        problems.append("train.epochs: the number of samples in a stream is not known; set train.steps")
    if isinstance(config.validation.holdout, int) and config.validation.holdout > 0:
        problems.append("validation.holdout: images of a stream cannot be held out; name a folder")
    if config.eval is not None and not config.eval.prompts:
        problems.append("eval.prompts: list some, as the captions of a stream are not known ahead")
    if config.data.export_tags:
        problems.append("data.export_tags: the captions of a stream are not counted; leave it out")
    if problems:
        raise ConfigError(*problems)
    shards = shards_of(config.data)
    if len(shards) < world:
        raise DataError(
            f"data.sources: {len(shards)} shards for {world} processes; each needs one, so divide them further"
        )
    return shards


def describe_stream(data: DataConfig, shards: int) -> str:
    """Return a stream in words."""
    stream = data.stream or StreamConfig()
    kept = f"up to {stream.store_gb:g} GB in the store" if stream.store_gb else "nothing of it kept"
    return f"a stream of {shards} shards, {stream.buffer} shuffled together, encoded while training, {kept}"
