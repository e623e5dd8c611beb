"""TensorBoard event files. tensorboard's own writer is not used, as it puts the host name into the file name."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import yaml
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.summary.writer.record_writer import RecordWriter

from sd3tune.config.files import short_path
from sd3tune.invocation import command_line
from sd3tune.tracking.base import Start

FOLDER = "tensorboard"


class TensorBoard:
    """A `Tracker`. Each record is flushed at once, so a killed run loses none."""

    def __init__(self, start: Start) -> None:
        folder = start.folder / FOLDER
        start.remove_earlier(FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        self.where = command_line("tensorboard", "--logdir", short_path(folder))
        self._records = RecordWriter((folder / f"events.out.tfevents.{time.time():.0f}").open("xb"))
        self._write(Event(file_version="brain.Event:2"))
        self._add(0, [_text("config", f"```yaml\n{yaml.safe_dump(dict(start.config), sort_keys=False)}```")])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._add(step, [Summary.Value(tag=name, simple_value=value) for name, value in values.items()])

    def image(self, step: int, name: str, path: Path, caption: str) -> None:
        with Image.open(path) as opened:
            width, height = opened.size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
        metadata = SummaryMetadata(display_name=caption, plugin_data=SummaryMetadata.PluginData(plugin_name="images"))
        self._add(step, [Summary.Value(tag=name, image=image, metadata=metadata)])

    def close(self, finished: bool) -> None:
        self._records.close()

    def _add(self, step: int, values: list[Summary.Value]) -> None:
        self._write(Event(step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        self._records.write(event.SerializeToString())
        self._records.flush()


def _text(tag: str, markdown: str) -> Summary.Value:
    metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
    return Summary.Value(
        tag=tag, metadata=metadata, tensor=TensorProto(dtype=DT_STRING, string_val=[markdown.encode()])
    )
