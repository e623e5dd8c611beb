"""The tokenizers written from scratch give the numbers of transformers' own, for any text."""

from __future__ import annotations

import io
import json
import random
import unicodedata
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from examples.sd3_from_scratch.tokenizers import ClipTokenizer, T5Tokenizer
from sd3tune.model.base.resolve import resolve_base

OLD = unicodedata.ucd_3_2_0
"""Characters that every library's tables know: those of the `tokenizers` library are older than Python's."""
ASSIGNED = [char for char in map(chr, range(0x110000)) if OLD.category(char) not in ("Cn", "Cs", "Co")]
MARKS = [char for char in ASSIGNED if unicodedata.category(char)[0] == "M"]
WORDS = [
    "a", "photo", "of", "sks dog,", "it's", "the cat's", "don't", "I'll", "we've", "<|endoftext|>", "<|ENDOFTEXT|>",
    "</s>", "<unk>", "!", "!!", "<pad>", "<extra_id_7>", "red", "circle", "on", "blue", "background", "ﬁ", "①", "Å",
    "é", "½", "™", "ª", "º", "͏", "한국어", "日本語", "中文", "العربية", "हिन्दी", "👩‍👩‍👧", "🏳️‍🌈",
    "ΑΣ ΣΑΣ", "İstanbul", "ß", "ẞ", "▁", "a▁b", "\u0301x",
]  # fmt: skip
SPACES = ["", " ", "  ", "\t", "\n", "\r\n", "\u00a0", "\u2003", "'"]


def texts(count: int) -> list[str]:
    chance = random.Random(0)

    def text() -> str:
        several = range(chance.randrange(1, 30))
        kind = chance.randrange(5)
        if kind == 0:
            return "".join(chance.choice(ASSIGNED) for _ in several)
        if kind == 1:
            return "".join(chance.choice(WORDS) + chance.choice(SPACES) for _ in several)
        if kind == 2:
            return "".join(chance.choice("aeiuAEIOUnc1 2½ª©") + "".join(chance.sample(MARKS, kind)) for _ in several)
        if kind == 3:
            return "".join(chr(chance.randrange(32, 0x220)) for _ in several)
        return "".join(chance.choice("abcdefghijklmnop'  .,!-0123456789") for _ in range(chance.randrange(200)))

    return ["", "   ", " ".join(["dog"] * 500), "x" * 300, *(text() for _ in range(count))]


def assert_equal(theirs, ours, length: int) -> None:
    asked = texts(2000)
    found = theirs(asked, padding="max_length", max_length=length, truncation=True).input_ids
    for text, expected in zip(asked, found, strict=True):
        assert ours(text, length) == expected, text


@pytest.mark.parametrize("base", ["nano", "tiny"])
@pytest.mark.parametrize("part", ["tokenizer", "tokenizer_2"])
def test_clips(base: str, part: str) -> None:
    folder = resolve_base(base).path / part
    assert_equal(AutoTokenizer.from_pretrained(folder), ClipTokenizer(folder), 77)


def test_t5s_of_nano() -> None:
    folder = resolve_base("nano").path / "tokenizer_3"
    assert_equal(AutoTokenizer.from_pretrained(folder), T5Tokenizer(folder), 64)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 tokenizer as the released one: trained by SentencePiece under its default normalisation."""
    sentencepiece = pytest.importorskip("sentencepiece")
    chance, model, folder = random.Random(0), io.BytesIO(), tmp_path_factory.mktemp("t5")
    lines = [" ".join(chance.choices(WORDS, k=12)) for _ in range(2000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=150, hard_vocab_limit=False, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=0.98,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100}
    roles = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | roles))
    return folder


@pytest.mark.parametrize("form", ["spiece.model", "tokenizer.json"])
def test_t5s_with_sentencepieces_normalisation(trained: Path, tmp_path: Path, form: str) -> None:
    theirs = AutoTokenizer.from_pretrained(trained)
    assert "Precompiled" in str(theirs.backend_tokenizer.normalizer)
    if form == "tokenizer.json":
        theirs.save_pretrained(tmp_path)
    folder = tmp_path if form == "tokenizer.json" else trained
    assert (folder / form).exists()
    assert_equal(theirs, T5Tokenizer(folder), 64)
