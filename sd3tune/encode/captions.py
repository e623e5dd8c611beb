"""Encode captions into the store: one encoder in memory at a time, one text per forward pass."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from sd3tune.data.records import Record
from sd3tune.data.store import Store, key
from sd3tune.data.written import Caption
from sd3tune.encode.manifest import Manifest
from sd3tune.encode.report import (
    CAPTION_CHANGED,
    CAPTION_SETTING_CHANGED,
    LOST,
    NEW,
    EncodeReport,
    damage_warnings,
)
from sd3tune.encode.resources import check_room, is_mine, release
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS, ENCODERS
from sd3tune.model.load.quantized import load_text_encoder_in
from sd3tune.model.load.text import TextEncoder
from sd3tune.reporting import progress_bar

CLIP_LENGTH = 77

Keys = Mapping[str, Mapping[str, str]]
"""Encoder -> text -> store key."""
KeysAt = Mapping[int, Mapping[str, str]]
"""Length in tokens -> text -> store key, for one encoder."""

LLM_INT8 = "int8"
"""The name in store keys of an earlier form, which also rounded activations."""
_FORM_NAMES = {"int8": "int8 weights"}
"""Names in store keys of the forms whose own name is taken."""

logger = logging.getLogger(__name__)


def encode_captions(
    base: Base,
    texts: Iterable[str],
    store: Store,
    *,
    captions: Iterable[Caption] = (),
    encoders: Sequence[str] = ENCODERS,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    max_sequence_length: int = 256,
    extra_t5_lengths: Sequence[int] = (),
    t5_form: str = "none",
    t5_form_name: str | None = None,
    t5_device: torch.device | str | None = None,
    progress: bool = False,
    records: Sequence[Record] = (),
    rank: int = 0,
    world: int = 1,
    say: Callable[[str], None] = logger.info,
) -> tuple[Keys, EncodeReport]:
    """Encode what the store lacks; return encoder -> text -> key, and the report.

    All encoders read the `texts`; of `captions`, each encoder reads its own text. T5 also encodes each text at
    `extra_t5_lengths`, in tokens; `caption_keys` returns the keys of these entries. Entries are {"hidden": [T, D]} and,
    for CLIP, {"pooled": [P]}, in `dtype`. An encoder is loaded only if entries are missing, and freed before the next.
    T5 is loaded in `t5_form` (see `quantized.FORMS`), on `t5_device` if it is given, else on `device`; see
    `caption_keys` for `t5_form_name`. With `records`, the report distinguishes changed captions from new ones. `say`
    receives the size of the entries to write. With `world` > 1 each rank encodes its share: wait for all ranks after
    this call, then call `store.refresh()`. The keys are complete on every rank. Raises ModelError, and RunError if the
    disk lacks space.
    """
    texts, captions = list(texts), list(captions)
    read = {encoder: texts_read_by(encoder, texts, captions) for encoder in encoders}
    unique = list(dict.fromkeys(text for of in read.values() for text in of))
    lengths = list(dict.fromkeys([max_sequence_length, *(extra_t5_lengths if "t5" in encoders else ())]))
    keys_at = functools.partial(caption_keys, base, dtype=dtype, t5_form=t5_form, t5_form_name=t5_form_name)
    keys_of = {encoder: _by_length(functools.partial(keys_at, read[encoder]), encoder, lengths) for encoder in encoders}
    damaged = _damaged(keys_of, store)
    missing = {encoder: _without(keys, lambda key: key in store) for encoder, keys in keys_of.items()}
    passes = [(encoder, tokens, lacking) for encoder, keys in missing.items() for tokens, lacking in keys.items()]
    nbytes = sum(entry_bytes(base, encoder, dtype, tokens) * len(lacking) for encoder, tokens, lacking in passes)
    reasons = _reasons(dict.fromkeys(text for _, _, lacking in passes for text in lacking), records, store)
    if nbytes:
        say(check_room(store.root, "captions", sum(len(lacking) for _, _, lacking in passes), nbytes))

    cut: dict[str, dict[str, int]] = {}
    for encoder, keys_at_length in missing.items():
        mine = _without(keys_at_length, lambda key: not is_mine(key, rank, world))
        if any(mine.values()):
            is_t5 = encoder == "t5"
            form, where = (t5_form, t5_device or device) if is_t5 else ("none", device)
            load = functools.partial(load_text_encoder_in, form, base, encoder, dtype, where, max_sequence_length)
            for tokens, lost in _encode(load, encoder, mine, store, progress).items():
                cut[f"{'T5' if is_t5 else 'CLIP'} takes {tokens} tokens"] = lost
            release(device)

    if rank == 0:
        Manifest.add(store.root, captions={str(record.image): record.caption for record in records}, texts=unique)
    keys = {encoder: next(iter(by_length.values())) for encoder, by_length in keys_of.items()}
    warnings = [*damage_warnings(damaged), *cut_off(cut)]
    return keys, EncodeReport("captions", _extent(read, lengths), len(unique), reasons, nbytes, warnings)


def _extent(read: Mapping[str, Sequence[str]], t5_lengths: Sequence[int]) -> str:
    """Return the number of texts in words; `read` has those of each encoder."""
    counts = {encoder: f"{len(texts)} text{'s' * (len(texts) != 1)}" for encoder, texts in read.items()}
    alike = len({tuple(texts) for texts in read.values()}) == 1
    extent = (
        f"{next(iter(counts.values()))} x {len(counts)} encoders"
        if alike
        else ", ".join(f"{count} for {encoder}" for encoder, count in counts.items())
    )
    return extent + f", T5 at {', '.join(map(str, t5_lengths))} tokens" * (len(t5_lengths) > 1)


def texts_read_by(encoder: str, texts: Iterable[str], captions: Iterable[Caption]) -> list[str]:
    """Return the different texts that an encoder reads: the captions' own, then `texts`."""
    return list(dict.fromkeys([*(caption.read_by(encoder) for caption in captions), *texts]))


def _damaged(keys_of: Mapping[str, KeysAt], store: Store) -> list[str]:
    """Return the beginnings of the texts with damaged entries."""
    keys = [
        (text, key) for by_length in keys_of.values() for texts in by_length.values() for text, key in texts.items()
    ]
    damaged = set(store.check(key for _, key in keys))
    return list(dict.fromkeys(repr(text[:60]) for text, key in keys if key in damaged))


def _by_length(keys_at: Callable[..., Keys], encoder: str, t5_lengths: Sequence[int]) -> KeysAt:
    lengths = t5_lengths if encoder == "t5" else [CLIP_LENGTH]
    return {tokens: keys_at(encoders=[encoder], max_sequence_length=tokens)[encoder] for tokens in lengths}


def _without(keys: KeysAt, unwanted: Callable[[str], bool]) -> KeysAt:
    return {tokens: {text: key for text, key in texts.items() if not unwanted(key)} for tokens, texts in keys.items()}


def caption_keys(
    base: Base,
    texts: Iterable[str],
    *,
    encoders: Sequence[str],
    dtype: torch.dtype,
    max_sequence_length: int,
    t5_form: str = "none",
    t5_form_name: str | None = None,
) -> Keys:
    """Return encoder -> text -> key, each text once, in order. Only T5's keys depend on its length and form.

    `t5_form_name` names the form in the keys; `LLM_INT8` for a run that an earlier version began in int8.
    """
    name = t5_form_name or _FORM_NAMES.get(t5_form, t5_form)
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
            **({"form": name} if encoder == "t5" and t5_form != "none" else {}),
        }
        keys[encoder] = {text: key("text", text=text, **conditions) for text in unique}
    return keys


def _encode(
    load: Callable[[], TextEncoder],
    encoder: str,
    keys: KeysAt,
    store: Store,
    progress: bool,
) -> dict[int, dict[str, int]]:
    """Encode texts under their keys. Return length -> text -> number of tokens cut off, for texts that are too long."""
    total = sum(map(len, keys.values()))
    bar = progress_bar(total=total, desc=f"encoding captions, {encoder}", unit="text", disable=not progress)
    lost: dict[int, dict[str, int]] = {tokens: {} for tokens in keys}
    with bar, store.writer() as writer:
        text_encoder = load()
        for tokens, of in keys.items():
            text_encoder.max_length = tokens
            for text, key in of.items():
                (entry,) = text_encoder.encode([text])
                writer.put(key, entry)
                if beyond := text_encoder.truncated(text):
                    lost[tokens][text] = beyond
                bar.update()
    return lost


def entry_bytes(base: Base, encoder: str, dtype: torch.dtype, max_sequence_length: int) -> int:
    """Return the bytes of one entry, from the encoder's configuration alone; the length applies to T5."""
    config = base.config(ENCODER_PARTS[encoder][1])
    if encoder == "t5":
        return max_sequence_length * config["d_model"] * dtype.itemsize
    return (CLIP_LENGTH * config["hidden_size"] + config["projection_dim"]) * dtype.itemsize


def text_bytes(base: Base, encoder: str, dtype: torch.dtype, t5_lengths: Sequence[int]) -> int:
    """Return the bytes of a text's entries for one encoder, at all lengths."""
    return sum(
        entry_bytes(base, encoder, dtype, tokens) for tokens in (t5_lengths if encoder == "t5" else [CLIP_LENGTH])
    )


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


def cut_off(cut: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return warnings from limit in words -> text -> number of tokens beyond it, at least 1."""
    return [
        f"{len(lost)} caption{'s' * (len(lost) != 1)} too long: {limit}, so the last {max(lost.values())} of "
        f"{max(lost, key=lambda text: lost[text])[:60]!r} are cut off"
        for limit, lost in cut.items()
        if lost
    ]
