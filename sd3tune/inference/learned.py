"""The learned tokens of a job: those of `--embedding`, and those that pivotal tuning wrote beside its adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from sd3tune.adapter.embedding import EMBEDDING_FILE, Embedding, embedding_beside, in_other_words, with_aliases
from sd3tune.adapter.file import Adapter
from sd3tune.errors import AdapterError
from sd3tune.inference.image_request import PROMPT_OF, ImageRequest
from sd3tune.inference.session import InferenceSession
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.reporting import say

_TEXTS = ("prompt", "negative", *PROMPT_OF.values())


def own_embeddings(adapters: Sequence[Adapter], given: Sequence[Embedding]) -> dict[int, Embedding]:
    """Return the learned tokens beside the adapters, by index, and say so; `given` ones take their place.

    Warns of an adapter without the file. Raises AdapterError for a file that cannot be used.
    """
    found: dict[int, Embedding] = {}
    tokens = {one.token for one in given}
    for number, adapter in enumerate(adapters):
        one, stated = embedding_beside(adapter), adapter.contract.get("embedding")
        if one is not None and one.token not in tokens:
            found[number] = one
            say(f"{adapter.label}: {one.in_words()} loaded into CLIP-L and CLIP-G")
        elif one is None and isinstance(stated, dict) and stated.get("token") not in tokens:
            say(
                f"warning: {adapter.label} was trained with the token {stated.get('token')}, and {EMBEDDING_FILE} is "
                "not beside it; give its vectors with --embedding"
            )
    return with_aliases(found)


def check_embeddings(embeddings: Sequence[Embedding], base: Base) -> None:
    """Raise AdapterError for vectors of other widths than the base's."""
    problems = [
        f"{one.path}: made for another base: {name} has vectors of {rows.shape[1]} numbers, and in "
        f"{base.name} they have {width}"
        for one in embeddings
        for name, rows in one.rows.items()
        if rows.shape[1] != (width := base.config(ENCODER_PARTS[name][1])["hidden_size"])
    ]
    if problems:
        raise AdapterError(*problems)


def without_unused_tokens(
    request: ImageRequest, session: InferenceSession, others: Sequence[Embedding] = ()
) -> ImageRequest:
    """Return the request with T5's words in place of the tokens of `others`, and of adapters that it does not use."""
    used = {number for number, _ in request.loras}
    known = {one.token for one in (*session.embeddings, *(session.own[number] for number in used & session.own.keys()))}
    unused = [*others, *(one for number, one in session.own.items() if number not in used and one.token not in known)]
    if not unused:
        return request
    changed: dict[str, Any] = {
        name: in_other_words(text, unused) for name in _TEXTS if (text := getattr(request, name))
    }
    return replace(request, **changed)


def check_tokens(requests: Sequence[ImageRequest], session: InferenceSession) -> None:
    """Warn of a learned token in no prompt. Raises AdapterError if a picture uses two files for one token."""
    for request in requests:
        own = [session.own[number] for number, _ in request.loras if number in session.own]
        for token, count in Counter(one.token for one in (*session.embeddings, *own)).items():
            if count > 1:
                raise AdapterError(f"--embedding, --lora: {count} files are for the token {token}; give one of them")
    texts = [getattr(request, name) or "" for request in requests for name in _TEXTS]
    for one in (*session.embeddings, *session.own.values()):
        if not any(one.token in text for text in texts):
            say(f"warning: {one.path}: no prompt has its token, {one.token}, so its vectors change nothing")
