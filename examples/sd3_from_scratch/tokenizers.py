"""1. Text becomes numbers: CLIP's byte-pair encoding and T5's unigram model.

A tokenizer cuts a prompt into pieces of a fixed list, its vocabulary, and returns their numbers. CLIP builds a word's
pieces bottom-up, merging neighbours in a learned order. T5 scores pieces, and picks the cut with the highest sum.
"""

import base64
import json
import math
import re
import struct
import unicodedata
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

# White space as Unicode defines it; `str.isspace` accepts four more characters.
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"


class Tokenizer:
    """The common part of both: cutting to a length, padding, and `special` tokens such as `<|endoftext|>`, which are
    recognised as they are written. `ordinary(text)` yields the numbers of the text between them."""

    def __call__(self, text: str, length: int) -> list[int]:
        """Return exactly `length` token numbers: begin, the text, end, padding. A long text loses its end."""
        cuts = re.split("|".join(f"({re.escape(one)})" for one in sorted(self.special, reverse=True)), text)
        ids = [i for cut in cuts if cut for i in ([self.special[cut]] if cut in self.special else self.ordinary(cut))]
        ids = [*self.begin, *ids[: length - len(self.begin) - len(self.end)], *self.end]
        return ids + [self.pad] * (length - len(ids))


class ClipTokenizer(Tokenizer):
    """Byte-pair encoding (Sennrich et al. 2016) of bytes, as in GPT-2, with `</w>` at the end of each word."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:]  # after the line of the version
        self.order = {tuple(line.split(" ")): number for number, line in enumerate(merges) if line.strip()}
        roles = [settings[f"{role}_token"] for role in ("bos", "eos", "pad", "unk")]
        names = [name if isinstance(name, str) else name["content"] for name in roles]
        # Quirk: whatever has a role is special. CLIP-G pads with "!", so an exclamation mark is, too.
        self.special = {name: self.vocabulary[name] for name in names}
        begin, end, self.pad, self.unknown = (self.special[name] for name in names)
        self.begin, self.end = [begin], [end]
        self.known: dict[str, list[int]] = {}

    def ordinary(self, text: str) -> Iterator[int]:
        text = re.sub(f"[{SPACES}]+", " ", unicodedata.normalize("NFC", text))
        for word in _words("".join(character.lower() for character in text)):  # one by one: no final sigma
            if word not in self.known:
                self.known[word] = [self.vocabulary.get(piece, self.unknown) for piece in self._merged(word)]
            yield from self.known[word]

    def _merged(self, word: str) -> list[str]:
        """Return a word's pieces: its bytes, of which the pair that comes first in the list is merged, repeatedly."""
        pieces = [BYTES[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            first = min(pairs, key=lambda pair: self.order.get(pair, math.inf))
            if first not in self.order:
                break
            at = pairs.index(first)
            pieces[at : at + 2] = [first[0] + first[1]]
        return pieces


def _bytes() -> list[str]:
    """Return a visible character for each of the 256 bytes: its own if it has one, else one from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


BYTES = _bytes()
_AT_ONCE = re.compile(r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d")
_RUN = re.compile(r"L+|N| +|\*+")


def _words(text: str) -> list[str]:
    """Return English contractions, runs of letters, single digits, and runs of anything else but spaces."""
    kinds = "".join(" " if one in SPACES else unicodedata.category(one)[0] for one in text)
    kinds = re.sub("[^LN ]", "*", kinds)  # L is a letter, N a digit
    words, at = list[str](), 0
    while at < len(text):
        end = (_AT_ONCE.match(text, at) or _RUN.match(kinds, at)).end()
        word, at = text[at:end], end
        if word.startswith("<|") and word.endswith(
            "text|>"
        ):  # quirk: in capitals, a special token is no more than this
            words += ["<|", word[2:-2], "|>"]
        elif word.strip(SPACES):
            words.append(word)
    return words


class T5Tokenizer(Tokenizer):
    """A unigram model (Kudo 2018): of all ways to cut a word into pieces, the one with the highest sum of scores."""

    def __init__(self, folder: Path) -> None:
        self.begin, self.pad, self.end, self.unknown = [], 0, [1], 2
        fast = folder / "tokenizer.json"
        pieces, charsmap, self.special = _read_json(fast) if fast.exists() else _read_spiece(folder / "spiece.model")
        self.normalise = Normaliser(charsmap) if charsmap else str
        self.scores = {piece: (number, score) for number, (piece, score) in enumerate(pieces)}
        self.longest = max(map(len, self.scores))
        self.penalty = min(score for _, score in self.scores.values()) - 10

    def ordinary(self, text: str) -> Iterator[int]:
        for word in filter(None, re.split(f"[{SPACES}]+", self.normalise(text))):
            marked = word if word.startswith("▁") else "▁" + word  # the sign marks the beginning of a word
            for part in re.findall("▁[^▁]*", marked):
                yield from self._best(part)

    def _best(self, word: str) -> list[int]:
        """Return the best cut (Viterbi): of the ways to each position, only the best can be part of it."""
        best: list[tuple[float, int, int]] = [(0.0, 0, 0)] + [(-math.inf, 0, 0)] * len(word)
        for start in range(len(word)):
            alone = (self.unknown, self.penalty)  # a character that is no piece itself may still be cut off
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                found = self.scores.get(word[start:end], alone if end == start + 1 else None)
                if found and best[start][0] + found[1] > best[end][0]:
                    best[end] = (best[start][0] + found[1], start, found[0])
        ids, at = list[int](), len(word)
        while at > 0:
            _, at, number = best[at]
            if not (number == self.unknown and ids and ids[-1] == self.unknown):  # neighbours become one
                ids.append(number)
        return ids[::-1]


class Normaliser:
    """SentencePiece's table of replacements, such as `ﬁ` by `fi` and `\\t` by a space.

    The table is a trie in one array (a "double array"): from the cell of a prefix, its next byte leads to another cell.
    """

    def __init__(self, charsmap: bytes) -> None:
        size = int.from_bytes(charsmap[:4], "little")
        self.cells, self.replacements = struct.unpack_from(f"<{size // 4}I", charsmap, 4), charsmap[4 + size :]

    def __call__(self, text: str) -> str:
        return "".join(map(self._replaced, _clusters(text)))

    def _replaced(self, cluster: str) -> str:
        # Quirk: the first match counts, and stands for all of a short cluster, even if it is only its beginning.
        if len(cluster.encode()) < 6 and (whole := self._find(cluster)) is not None:
            return whole
        return "".join(one if (found := self._find(one)) is None else found for one in cluster)

    def _find(self, text: str) -> str | None:
        """Return the replacement of the shortest beginning of `text` that has one."""
        at = _offset(self.cells[0])
        for byte in text.encode():
            at ^= byte
            cell = self.cells[at] if at < len(self.cells) else 0
            if byte == 0 or cell & 0x800000FF != byte:
                return None
            at ^= _offset(cell)
            if cell >> 8 & 1:  # the cell it leads to holds a value: where the replacement begins
                begin = self.cells[at] & 0x7FFFFFFF
                return self.replacements[begin : self.replacements.index(0, begin)].decode()
        return None


_LETTER_LIKE = re.compile(
    "[\u102b\u102c\u1038\u1062-\u106d\u1083\u1087-\u108c\u108f\u109a-\u109c\u1a61\u1a63\u1a64\uaa7b\uaa7d]"
)
"""Vowel signs of Burmese and its neighbours that stand for themselves (Unicode Annex 29)."""


def _offset(cell: int) -> int:
    return cell >> 10 << ((cell & 0x200) >> 6)


def _clusters(text: str) -> Iterator[str]:
    """Yield what a reader sees as one character: a character with the marks that belong to it."""
    cluster = ""
    for character in text:
        is_mark = unicodedata.category(character)[0] == "M" and not _LETTER_LIKE.match(character)
        is_mark |= character in "\u200c\u200d"
        if cluster and not (is_mark and unicodedata.category(cluster[-1]) not in ("Cc", "Zl", "Zp")):
            yield cluster
            cluster = ""
        cluster += character
    yield cluster


def _read_json(file: Path) -> tuple[list[tuple[str, float]], bytes, dict[str, int]]:
    """Return the pieces with their scores, the normaliser's table, and the special tokens of a `tokenizer.json`."""
    found = json.loads(file.read_text(encoding="utf-8"))
    normaliser = found["normalizer"] or {}
    tables = [one.get("precompiled_charsmap") for one in (normaliser, *normaliser.get("normalizers", []))]
    charsmap = base64.b64decode(next(filter(None, tables), ""))
    return found["model"]["vocab"], charsmap, {one["content"]: one["id"] for one in found["added_tokens"]}


def _read_spiece(file: Path) -> tuple[list[tuple[str, float]], bytes, dict[str, int]]:
    """Return the same from SentencePiece's own file, a protobuf message: 1 are its pieces, 3 is its normaliser."""
    model = list(_fields(file.read_bytes()))
    pieces = [dict(_fields(value)) for number, value in model if number == 1]
    vocabulary = [(piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0) for piece in pieces]
    vocabulary += [(f"<extra_id_{99 - number}>", 0.0) for number in range(100)]  # T5 marks gaps in texts with these
    special = {name: number for number, (name, _) in enumerate(vocabulary) if re.fullmatch(r"</?\w+>", name)}
    charsmap = next((dict(_fields(value)).get(2, b"") for number, value in model if number == 3), b"")
    return vocabulary, charsmap, special


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, content) of each field of a protobuf message; content of another kind than bytes is as stored."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind, begin = key & 7, at
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, begin = _varint(message, at)
            at = begin + size
        else:
            at += {1: 8, 5: 4}[kind]
        yield key >> 3, message[begin:at]


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """Return a number, of which each byte holds seven bits, and the position after it."""
    end = next(place for place in range(at, len(message)) if message[place] < 128) + 1
    return sum((byte & 127) << 7 * place for place, byte in enumerate(message[at:end])), end
