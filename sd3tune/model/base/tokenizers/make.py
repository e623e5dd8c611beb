"""Make the committed tokenizer files of the tiny bases from `words.txt`: run `python make.py` here.

CLIP: OpenAI's layout in small: 256 bytes ("!" is 0), 256 bytes that end a word, merges that build each word
from the left, <|startoftext|> and <|endoftext|>. T5: <pad> </s> <unk>, the words, then single characters.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import T5TokenizerFast

BOS, EOS = "<|startoftext|>", "<|endoftext|>"


def byte_symbols() -> list[str]:
    """Return GPT-2's printable stand-ins for the 256 bytes, in CLIP's order: printable ones first."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(hidden))]


def clip_merges(words: list[str]) -> list[tuple[str, str]]:
    """Return the merges that make each word one token: apply existing ones, then join the remainder from the left."""
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        for pair in merges:
            symbols = merge(symbols, pair)
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            merges[pair] = None
            symbols = merge(symbols, pair)
    return list(merges)


def merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def clip_files(folder: Path, words: list[str], pad: str) -> None:
    """Write a CLIP tokenizer. CLIP-L pads with the end token, CLIP-G with "!", a special token as in the original."""
    symbols, merges = byte_symbols(), clip_merges(words)
    tokens = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(pair) for pair in merges),
        BOS,
        EOS,
    ]
    ids = {token: n for n, token in enumerate(dict.fromkeys(tokens))}
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": pad, "unk_token": EOS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    added = {str(ids[token]): {"content": token, **flags} for token in sorted({BOS, EOS, pad}, key=ids.__getitem__)}
    config = {
        "added_tokens_decoder": added,
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", ids)
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def t5_files(folder: Path, words: list[str]) -> None:
    """Write the T5 tokenizer. Earlier words cost less, and a word always costs less than its characters."""
    letters = ["▁", *(chr(code) for code in [*range(33, 127), *range(161, 256)])]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [("▁" + word, -4.0 - n / 100) for n, word in enumerate(words)]
    pieces += [(letter, -12.0) for letter in letters]
    pieces += [(suffix, -11.0) for suffix in ("s", "ed", "er", "ing", "ly") if suffix not in letters]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "tokenizer.json", json.loads(tokenizer.backend_tokenizer.to_str()))
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = {"extra_ids": 0, "model_max_length": 512, "tokenizer_class": "T5Tokenizer", **special}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def make(root: Path) -> None:
    """Write the folders `clip_l`, `clip_g` and `t5` into `root`."""
    words = list(dict.fromkeys((Path(__file__).parent / "words.txt").read_text(encoding="utf-8").split()))
    clip_files(root / "clip_l", words, pad=EOS)
    clip_files(root / "clip_g", words, pad="!")
    t5_files(root / "t5", words)


if __name__ == "__main__":
    make(Path(__file__).parent)
