"""Entries of a store that are encoded when they are asked for, by encoders that stay in memory.

They are equal to the entries that are encoded ahead, bit for bit. The store keeps them up to a size, if any.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sd3tune.data.buckets import Size
from sd3tune.data.crops import Crop, cover, crops, pixels
from sd3tune.data.images import ImageRef, read_image
from sd3tune.data.store import Store
from sd3tune.encode.captions import caption_keys
from sd3tune.encode.images import NOT_FINITE, image_key
from sd3tune.errors import DataError, ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.load.latents import encode_moments
from sd3tune.model.load.text import TextEncoder

TEXT_BYTES = 256 * 2**20
"""Limit on the embeddings in memory, for captions that come again."""
_JOBS = 50_000
"""Limit on the entries that were announced and not asked for yet."""

Entry = Mapping[str, Tensor]


@dataclass(frozen=True)
class LiveEncoders:
    """The models that stay in memory while training."""

    vae: Any
    text: Mapping[str, TextEncoder]
    """Encoder -> itself: `clip_l`, `clip_g`, `t5`."""


@dataclass(frozen=True)
class _Cut:
    image: ImageRef
    digest: str
    crop: Crop


class LiveStore(Store):
    """A store that encodes the images and captions which were announced to it. Thread-safe.

    `most_bytes` is the size of the store up to which new entries are written, by `world` processes in equal parts. The
    keys are those of `base` in `dtype`, with T5 at `t5_length` tokens.
    """

    def __init__(
        self,
        store: Store,
        encoders: LiveEncoders,
        base: Base,
        dtype: torch.dtype,
        t5_length: int,
        most_bytes: int,
        world: int = 1,
    ) -> None:
        super().__init__(store.root)
        self.encoders, self.base, self.dtype, self.t5_length = encoders, base, dtype, t5_length
        self._left = (most_bytes - sum(entry.nbytes for entry in self._index.values())) // world
        self._jobs: OrderedDict[str, _Cut | tuple[str, str]] = OrderedDict()
        self._texts: OrderedDict[str, Entry] = OrderedDict()
        self._text_bytes = 0
        self._decoded: dict[str, Future[Tensor]] = {}
        self._encoding = threading.RLock()
        self._threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="decoding")
        self._closing = contextlib.ExitStack()
        self._writer = self._closing.enter_context(self.writer()) if self._left > 0 else None

    def announce_image(
        self, image: ImageRef, digest: str, mark: str, size: Size, target: Size, variants: int, flip: bool
    ) -> tuple[str, ...]:
        """Return the key of each crop of an image; `size` and `target` are (height, width)."""
        vae, dtype = self.base.fingerprint("vae"), self.encoders.vae.dtype
        cuts = crops(size, target, variants, flip, digest)
        keyed = {image_key(vae, dtype, digest, mark, cut): cut for cut in cuts}
        self._announce({key: _Cut(image, digest, cut) for key, cut in keyed.items()})
        return tuple(image_key(vae, dtype, digest, mark, cut) for cut in cuts)

    def announce_caption(self, texts: Mapping[str, str], form: str) -> dict[str, str]:
        """Return encoder -> key for encoder -> text. `form` is T5's quantization."""
        keys = {}
        for encoder, text in texts.items():
            (key,) = caption_keys(
                self.base,
                [text],
                encoders=[encoder],
                dtype=self.dtype,
                max_sequence_length=self.t5_length,
                t5_form=form,
            )[encoder].values()
            keys[encoder] = key
            self._announce({key: (encoder, text)})
        return keys

    def _announce(self, jobs: Mapping[str, _Cut | tuple[str, str]]) -> None:
        with self._encoding:
            self._jobs.update(jobs)
            while len(self._jobs) > _JOBS:
                self._jobs.popitem(last=False)

    def prepare(self, keys: Sequence[str]) -> None:
        """Begin to decode the images of these keys, on threads."""
        with self._encoding:
            for key in keys:
                job = self._jobs.get(key)
                if isinstance(job, _Cut) and key not in self and key not in self._decoded:
                    self._decoded[key] = self._threads.submit(_decoded, job)
            while len(self._decoded) > 8 * len(keys):  # those that were found in the store meanwhile
                del self._decoded[next(iter(self._decoded))]

    @torch.no_grad()
    def get(self, key: str) -> dict[str, Tensor]:
        """Return the tensors of an entry, encoded now if it is neither in the store nor in memory."""
        if key in self:
            return super().get(key)
        with self._encoding:
            if key in self._texts:
                self._texts.move_to_end(key)
                return dict(self._texts[key])
            job = self._jobs[key]
            entry = self._image(key, job) if isinstance(job, _Cut) else self._text(key, *job)
            self._keep(key, entry)
            return dict(entry)

    def _image(self, key: str, job: _Cut) -> Entry:
        decoding = self._decoded.pop(key, None)
        mean, std = encode_moments(self.encoders.vae, decoding.result() if decoding else _decoded(job))
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise ModelError(f"{job.image}: {NOT_FINITE}")
        return {"mean": mean[0], "std": std[0]}

    def _text(self, key: str, encoder: str, text: str) -> Entry:
        (entry,) = self.encoders.text[encoder].encode([text])
        self._texts[key] = entry
        self._text_bytes += _bytes(entry)
        while self._text_bytes > TEXT_BYTES and len(self._texts) > 1:
            self._text_bytes -= _bytes(self._texts.popitem(last=False)[1])
        return entry

    def _keep(self, key: str, entry: Entry) -> None:
        if self._writer is None or _bytes(entry) > self._left:
            return
        self._left -= _bytes(entry)
        self._writer.put(key, entry)

    def close(self) -> None:
        """Write what is left to write."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._closing.close()


def _decoded(job: _Cut) -> Tensor:
    image, digest = read_image(job.image)
    if digest != job.digest:
        raise DataError(f"{job.image}: changed while it was read; run again")
    return pixels(cover(image, job.crop.size), job.crop)


def _bytes(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry.values())
