"""What a captioning model is asked, and how a caption is made of its answer."""

from __future__ import annotations

import re

MOST_WORDS = 40
"""Words that the model is asked for at most, so that most captions fit into the 77 tokens that CLIP reads."""

_PICTURE = r"(?:image|picture|photo|photograph|scene)"
_SHOWS = (
    r"(?:(?:shows?|depicts?|features?|captures?|displays?|presents?|portrays?|illustrates?|contains?)\b"
    r"|(?:is|showing|depicting|of)\b(?:\s+(?:of|showing)\b)?)"
)
_OPENING = re.compile(
    rf"""\A(?:
      (?:sure|certainly|of\ course|okay)\b[\s,.!]*
    | here(?:'s|\ is|\ are)\b[^:]{{0,80}}:
    | (?:caption|description|answer)\s*:
    | (?:the|this|an?)\s+{_PICTURE}\s+{_SHOWS}
    | in\s+(?:the|this)\s+{_PICTURE}\b\s*,?
    | (?:we|you|i)\s+(?:can\s+)?see\b
    | there\s+(?:is|are)\b
    )\s*""",
    re.IGNORECASE | re.VERBOSE,
)
"""A phrase with which chat models begin, and which describes nothing."""
_REFUSAL = re.compile(
    r"(?:i(?:'m| am) (?:sorry|unable|not able)|sorry\b|i can(?:not|'t|\W+t)\b|as an ai\b|unfortunately\b)",
    re.IGNORECASE,
)
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_LIST_ITEM = re.compile(r"^\s*(?:[-*\u2022]|\d{1,2}[.)])\s+", re.MULTILINE)
_QUOTES = {'"': '"', "'": "'", "\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb"}


def instruction(subject: str | None) -> str:
    """Return the question for a picture of `subject`, such as "dog": everything that is not the subject."""
    named = subject or "main subject"
    return (
        f"This picture is one of several of the same {named}. Describe everything in it that may change from one "
        f"picture to the next: what the {named} does and how it is posed, the things beside it, the place, the "
        f"background, the light and the camera angle. Say nothing about how the {named} itself looks: not its colour, "
        f"shape, material, breed, face or hair. Answer with one line of short phrases, separated by commas, of at most "
        f"{MOST_WORDS} words, and without an introduction."
    )


def caption_of(answer: str, complete: bool, trigger: str | None, subject: str | None) -> str | None:
    """Return the caption `TRIGGER SUBJECT, description`; None for an answer that describes nothing.

    An answer that is not `complete`, as the limit of its length was reached, ends at its last comma or full stop.
    """
    description = _description(answer, complete, subject)
    if not description:
        return None
    name = " ".join(f"{trigger or ''} {subject or ''}".split())
    return f"{name}, {description}" if name else description


def _description(answer: str, complete: bool, subject: str | None) -> str:
    """Return the answer as one line, without phrases of a chat."""
    text = _LIST_ITEM.sub("", _THOUGHTS.sub("", answer).replace("\u2019", "'"))
    text = " ".join(re.sub(r"[*`#\ufffd]+", "", text).split())
    text = _unquoted("".join(letter for letter in text if letter.isprintable()))
    if _REFUSAL.match(text):
        return ""
    while (rest := _unquoted(_OPENING.sub("", text))) != text:
        text = rest
    if subject:  # whose name stands in front already
        text = re.sub(
            rf"\A(?:the |an? )?{re.escape(subject)}\s*(?:[,:]|\b(?:is|are)\b)\s*", "", text, flags=re.IGNORECASE
        )
    if not complete:
        end = max(text.rfind(mark) for mark in ",.;")
        text = text[:end] if end > 0 else text.rpartition(" ")[0]
    # A model that overflows in half precision says nothing but exclamation marks.
    return text.strip(" ,;:-.") if any(letter.isalpha() for letter in text) else ""


def _unquoted(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if len(text) > 1 and _QUOTES.get(text[0]) == text[-1] else text
