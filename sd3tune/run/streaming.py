"""The batches of a run on streams, and the encoders that it keeps in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sd3tune.config.sections.data import StreamConfig
from sd3tune.data.buckets import Size, nearest_bucket
from sd3tune.data.sampler import step_slots
from sd3tune.data.store import Store, key
from sd3tune.data.stream.reader import ShardReader, StreamedImage
from sd3tune.data.stream.stream import Stream
from sd3tune.data.written import Caption
from sd3tune.encode.live import LiveEncoders, LiveStore
from sd3tune.model.load.components import load_vae, vae_dtype
from sd3tune.model.load.quantized import load_text_encoder_in
from sd3tune.reporting import say
from sd3tune.run.preflight import Plan
from sd3tune.runtime.processes import Processes
from sd3tune.training.batches import Batches
from sd3tune.training.examples import Example, Sample

_AHEAD = 2
"""Batches beyond the next whose images are decoded on threads."""
_NAMES = 4096
"""Batches whose names are kept for the metrics, which are written later."""


class StreamBatches(Batches):
    """The batches of a rank, read from a stream and encoded as they are asked for.

    The batches of the other ranks are not known here: `names` describes their samples by number.
    """

    def __init__(self, live: LiveStore, stream: Stream[StreamedImage], plan: Plan, **settings: Any) -> None:
        super().__init__(live, (), **settings)
        self.live, self.stream, self.plan = live, stream, plan
        self._names: dict[int, list[str]] = {}

    def close(self) -> None:
        super().close()
        self.stream.close()
        self.live.close()

    def names(self, step: int) -> list[str]:
        found = []
        for rank in range(self.world):
            for micro in range(self.accumulation):
                number = step * self.accumulation + micro
                unknown = [f"sample {place} of process {rank}" for place in range(self.batch_size)]
                found += self._names.get(number, unknown) if rank == self.rank else unknown
        return found

    def _load(self, step: int, micro: int) -> Any:
        first = step * self.accumulation + micro
        for number in range(first, first + 1 + _AHEAD):
            of_step, of_micro = divmod(number, self.accumulation)
            samples = self._samples(of_step, of_micro, self.rank)
            variants = [sample.example.images[sample.variant(self.seed, of_step)] for sample in samples]
            self.live.prepare(variants)
        return super()._load(step, micro)

    def _samples(self, step: int, micro: int, rank: int) -> list[Sample]:
        number = step * self.accumulation + micro
        images = self.stream.batch(number)
        self._names[number] = [one.record.image.name for one in images]
        while len(self._names) > _NAMES:
            self._names.pop(next(iter(self._names)), None)
        slots = step_slots(micro, self.rank, self.world, self.batch_size)
        return [Sample(self._example(one), slot) for one, slot in zip(images, slots, strict=True)]

    def _example(self, one: StreamedImage) -> Example:
        record, data, model = one.record, self.plan.config.data, self.plan.config.model
        target = bucket_of_image(one, self.plan.buckets)
        images = self.live.announce_image(
            record.image, one.digest, one.mark, record.upright_size, target, data.crop_variants, data.flip
        )

        def keys_of(caption: Caption) -> dict[str, str]:
            texts = {encoder: caption.read_by(encoder) for encoder in self.plan.method.cached_encoders}
            return self.live.announce_caption(texts, model.t5_quantize)

        drawn = [keys_of(caption) for caption in record.drawn]
        choices = tuple(drawn) if len(drawn) > 1 else ()
        return Example(record.image.name, images, drawn[0], target, weight=record.weight, choices=choices)


def bucket_of_image(one: StreamedImage, buckets: Sequence[Size]) -> Size:
    """Return the bucket that a sample is cropped to."""
    return nearest_bucket(one.record.upright_size, buckets)


def stream_batches(plan: Plan, store: Store, processes: Processes, **settings: Any) -> StreamBatches:
    """Return the batches of a run on streams for this process, and load its encoders."""
    config, base, stream = plan.config, plan.base, plan.config.data.stream or StreamConfig()
    t5_device = "cpu" if config.model.t5_device == "cpu" else plan.device
    length = config.model.max_sequence_length
    encoders = LiveEncoders(
        load_vae(base, vae_dtype(plan.dtype), plan.device),
        {
            name: load_text_encoder_in(
                config.model.t5_quantize if name == "t5" else "none",
                base,
                name,
                plan.dtype,
                t5_device if name == "t5" else plan.device,
                length,
            )
            for name in plan.method.cached_encoders
        },
    )
    most = round(stream.store_gb * 1e9)
    live = LiveStore(store, encoders, base, plan.dtype, length, most, processes.world)
    folder = store.root / "streams"
    reader = ShardReader(config.data, config.seed, plan.shards, folder, lambda line: say(f"warning: {line}"))
    batches: Stream[StreamedImage] = Stream(
        reader.read,
        lambda one: bucket_of_image(one, plan.buckets),
        seed=config.seed,
        rank=processes.rank,
        world=processes.world,
        shards=len(plan.shards),
        buffer=stream.buffer,
        batch_size=config.train.batch_size,
        notes=folder / f"{_identity(plan, processes)}.jsonl",
    )
    return StreamBatches(live, batches, plan, **settings)


def _identity(plan: Plan, processes: Processes) -> str:
    """Return a name for all that determines the batches of a rank."""
    config = plan.config
    return key(
        "stream",
        shards=[shard.name for shard in plan.shards],
        files=[shard.identity for shard in plan.shards],
        sources=[source.model_dump(mode="json") for source in config.data.sources],
        trigger=config.data.trigger,
        stream=(config.data.stream or StreamConfig()).buffer,
        buckets=list(plan.buckets),
        seed=config.seed,
        rank=[processes.rank, processes.world],
        batch=config.train.batch_size,
    )[:16]


def streamed_content(plan: Plan) -> dict[str, str | int]:
    """Return the part of a run's identity that describes its streams; empty for other runs."""
    if not plan.shards:
        return {}
    keys = ("caption", "captions", "tags", "wildcards", "variants", "template", "weight", "trigger", "class_names")
    of_sources = [source.model_dump(mode="json") for source in plan.config.data.sources]
    settings = [{name: source.get(name) for name in (*keys, "caption_field")} for source in of_sources]
    shards = [(shard.source, *shard.identity) for shard in plan.shards]
    content = key("stream", shards=shards, settings=settings, trigger=plan.config.data.trigger)[:16]
    return {"shards": content, "buffer": (plan.config.data.stream or StreamConfig()).buffer}
