"""Captions into the store: per encoder, one encoder in memory at a time, one text per forward pass."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from tqdm import tqdm

from sd3tune.data.records import Record
from sd3tune.data.store import Store, key
from sd3tune.encode.manifest import Manifest
from sd3tune.encode.report import CAPTION_CHANGED, CAPTION_SETTING_CHANGED, LOST, NEW, EncodeReport
from sd3tune.encode.resources import check_room, is_mine, release
from sd3tune.model.bases import ENCODER_PARTS, ENCODERS, Base
from sd3tune.model.quantized import load_text_encoder_in
from sd3tune.model.text import TextEncoder

CLIP_LENGTH = 77

logger = logging.getLogger(__name__)


def encode_captions(
    base: Base,
    texts: Iterable[str],
    store: Store,
    *,
    encoders: Sequence[str] = ENCODERS,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_sequence_length: int = 256,
    t5_form: str = "none",
    t5_device: torch.device | str | None = None,
    progress: bool = False,
    records: Sequence[Record] = (),
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = logger.info,
) -> tuple[dict[str, dict[str, str]], EncodeReport]:
    """Encode what the store lacks of `texts`; returns encoder -> text -> key, and the report.

    Entries are {"hidden": [T, D]} and, for CLIP, {"pooled": [P]}, in `dtype`. An encoder is loaded only when
    something is missing, and freed before the next. T5 is held in `t5_form` (see `quantized.FORMS`), and
    on `t5_device` where that is not `device`. `records` lets the report tell a changed caption from a
    new one; `say` is told the size of what is about to be written. With `world` > 1 each rank encodes its share:
    put a barrier behind this call, then `store.refresh()`. The keys are complete on every rank. Raises ModelError,
    and RunError when the disk lacks the room.
    """
    length = max_sequence_length
    keys = caption_keys(base, texts, encoders=encoders, dtype=dtype, max_sequence_length=length, t5_form=t5_form)
    missing = {encoder: [text for text, key in of.items() if key not in store] for encoder, of in keys.items()}
    sizes = {encoder: entry_bytes(base, encoder, dtype, max_sequence_length) for encoder in encoders}
    nbytes = sum(sizes[encoder] * len(found) for encoder, found in missing.items())
    reasons = _reasons(dict.fromkeys(text for found in missing.values() for text in found), records, store)
    if nbytes:
        say(check_room(store.root, "captions", sum(map(len, missing.values())), nbytes))

    cut: dict[str, dict[str, int]] = {}
    for encoder, found in missing.items():
        mine = {text: keys[encoder][text] for text in found if is_mine(keys[encoder][text], rank, world)}
        if mine:
            is_t5 = encoder == "t5"
            form, where = (t5_form, t5_device or device) if is_t5 else ("none", device)
            load = functools.partial(load_text_encoder_in, form, base, encoder, dtype, where, length)
            tokens = length if is_t5 else CLIP_LENGTH
            cut[f"{'T5' if is_t5 else 'CLIP'} takes {tokens} tokens"] = _encode(load, encoder, mine, store, progress)
            release(device)

    every_text = list(dict.fromkeys(text for of in keys.values() for text in of))
    if rank == 0:
        captions = {str(record.image): record.caption for record in records}
        Manifest.add(store.root, captions=captions, texts=every_text)
    extent = f"{len(every_text)} text{'s' * (len(every_text) != 1)} x {len(encoders)} encoders"
    return keys, EncodeReport("captions", extent, len(every_text), reasons, nbytes, _warnings(cut))


def caption_keys(
    base: Base,
    texts: Iterable[str],
    *,
    encoders: Sequence[str],
    dtype: torch.dtype,
    max_sequence_length: int,
    t5_form: str = "none",
) -> dict[str, dict[str, str]]:
    """Encoder -> text -> key, each text once, in order. T5's length and form are in T5's keys alone."""
    unique = list(dict.fromkeys(texts))
    keys = {}
    for encoder in encoders:
        tokenizer_part, encoder_part = ENCODER_PARTS[encoder]
        conditions = {
            "encoder": encoder,
            "tokenizer": base.fingerprint(tokenizer_part),
            "weights": base.fingerprint(encoder_part),
            "dtype": str(dtype),
            "length": max_sequence_length if encoder == "t5" else CLIP_LENGTH,
            **({"form": t5_form} if encoder == "t5" and t5_form != "none" else {}),
        }
        keys[encoder] = {text: key("text", text=text, **conditions) for text in unique}
    return keys


def _encode(
    load: Callable[[], TextEncoder], encoder: str, keys: dict[str, str], store: Store, progress: bool
) -> dict[str, int]:
    """Encode the texts under their keys; returns the tokens lost by each text that is too long."""
    bar = tqdm(total=len(keys), desc=f"encoding captions, {encoder}", unit="text", disable=not progress)
    with bar, store.writer() as writer:
        text_encoder = load()
        lost = {}
        for text, key in keys.items():
            (entry,) = text_encoder.encode([text])
            writer.put(key, entry)
            lost[text] = text_encoder.truncated(text)
            bar.update()
    return {text: tokens for text, tokens in lost.items() if tokens}


def entry_bytes(base: Base, encoder: str, dtype: torch.dtype, max_sequence_length: int) -> int:
    """Bytes of one entry, from the encoder's configuration alone."""
    config = base.config(ENCODER_PARTS[encoder][1])
    if encoder == "t5":
        return max_sequence_length * config["d_model"] * dtype.itemsize
    return (CLIP_LENGTH * config["hidden_size"] + config["projection_dim"]) * dtype.itemsize


def _reasons(missing: Iterable[str], records: Sequence[Record], store: Store) -> dict[str, int]:
    manifest = Manifest.load(store.root)
    changed = {
        record.caption
        for record in records
        if manifest.captions.get(str(record.image), record.caption) != record.caption
    }

    def reason(text: str) -> str:
        if manifest.knows_text(text):
            return LOST if store.damaged or not len(store) else CAPTION_SETTING_CHANGED
        return CAPTION_CHANGED if text in changed else NEW

    return dict(Counter(map(reason, missing)))


def _warnings(cut: dict[str, dict[str, int]]) -> list[str]:
    return [
        f"{len(lost)} caption{'s' * (len(lost) != 1)} too long: {limit}, so the last {max(lost.values())} of "
        f"{max(lost, key=lambda text: lost[text])[:60]!r} are cut off"
        for limit, lost in cut.items()
        if lost
    ]
