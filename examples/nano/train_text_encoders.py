"""Train nano's text encoders from captions alone, and write them with their tokenizers, in about ten minutes.

python -m examples.nano.train_text_encoders --out data/nano/parts

Linear readers must recover the content of a caption from the MMDiT's inputs, penultimate states and pooled vectors:
from the pooled vector, from the mean over the words, and from the end token and the padding. From each word's state
they recover the word itself and the attributes of its thing. The readers are discarded afterwards.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from examples.nano.captions import OWNERS, SLOTS, random_caption
from examples.nano.probe_text_encoders import probe, table
from examples.nano.text_encoders import (
    CLIP_LENGTH,
    ENCODERS,
    OWN,
    T5_LENGTH,
    Batch,
    Tokens,
    load_tokenizer,
    new_encoder,
    states,
    tokenize,
    write_tokenizer,
)
from sd3tune.files.atomic import new_folder
from sd3tune.model.base.progress_bars import no_progress_bars

CAPTIONS = 60_000
BATCH_SIZE = 128
LEARNING_RATE, WARM_UP = 2e-3, 100
SLOT_SIZES = [len(values) for values in SLOTS.values()]
OWN_SIZES = [len(OWNERS), *(len(SLOTS[slot]) for slot in OWN)]
IDENTITIES = 256  # number of words per step whose identity is read
LONG_EVERY = 8  # every so many steps, the padding is long


class Readers(nn.Module):
    """Linear heads, each for the content of one kind of state."""

    def __init__(self, width: int, pooled_width: int, vocabulary: int) -> None:
        super().__init__()
        self.mean = nn.Linear(width, sum(SLOT_SIZES))
        self.end = nn.Linear(width, sum(SLOT_SIZES))
        self.own = nn.Linear(width, sum(OWN_SIZES))
        self.identity = nn.Linear(width, vocabulary)
        self.pooled = nn.Linear(pooled_width, sum(SLOT_SIZES)) if pooled_width else None

    def loss(self, batch: Batch, hidden: Tensor, pooled: Tensor | None) -> Tensor:
        rows = torch.arange(len(hidden))
        mean = (hidden * batch.is_word[..., None]).sum(1) / batch.is_word.sum(1, keepdim=True).clamp(min=1)
        padding = torch.rand(len(rows)) * (hidden.shape[1] - batch.ends)
        ends = torch.cat([hidden[rows, batch.ends], hidden[rows, batch.ends + padding.long()]])
        words, own = hidden[batch.is_word], torch.cat([batch.owners[..., None], batch.own], dim=-1)[batch.is_word]
        asked = torch.randint(len(words), (IDENTITIES,))
        loss = _reading(self.mean(mean), batch.whole, SLOT_SIZES)
        loss = loss + _reading(self.end(ends), batch.whole.repeat(2, 1), SLOT_SIZES)
        loss = loss + _reading(self.own(words), own, OWN_SIZES)
        loss = loss + 0.3 * F.cross_entropy(self.identity(words[asked]), batch.ids[batch.is_word][asked])
        loss = loss + 0.1 * _distance_from_standard(hidden.flatten(0, 1))
        if self.pooled is not None and pooled is not None:
            loss = loss + _reading(self.pooled(pooled), batch.whole, SLOT_SIZES)
            loss = loss + 0.1 * _distance_from_standard(pooled)
        return loss


def _reading(logits: Tensor, targets: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the mean cross entropy of several questions: logits [N, sum(sizes)], targets [N, len(sizes)]."""
    answers = zip(logits.split(list(sizes), dim=1), targets.unbind(1), strict=True)
    return torch.stack([F.cross_entropy(answer, target) for answer, target in answers]).mean()


def _distance_from_standard(values: Tensor) -> Tensor:
    """Return the distance of the features of values [N, D] from mean 0 and variance 1."""
    return (values.mean(0).square() + (values.var(0) - 1).square()).mean()


def train(
    encoder: str, model: nn.Module, tokens: Tokens, steps: int, seed: int, batch_size: int = BATCH_SIZE
) -> Iterator[float]:
    """Train for `steps` steps, and yield the loss of each."""
    torch.manual_seed(seed)
    width, pooled_width = _widths(encoder, model, tokens)
    readers = Readers(width, pooled_width, model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    parameters = [*model.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, steps))
    model.train()
    for step in range(steps):
        batch = _random_batch(encoder, tokens, batch_size, is_long=step % LONG_EVERY == 0)
        loss = readers.loss(batch, *states(encoder, model, batch.ids))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()
    model.eval()


def _widths(encoder: str, model: nn.Module, tokens: Tokens) -> tuple[int, int]:
    with torch.no_grad():
        hidden, pooled = states(encoder, model, tokens.ids[:1])
    return hidden.shape[-1], 0 if pooled is None else pooled.shape[-1]


def _random_batch(encoder: str, tokens: Tokens, size: int, is_long: bool) -> Batch:
    """Return a batch, usually as long as the longest caption, or T5's training length; a long batch has fewer rows."""
    rows = torch.randint(len(tokens.ids), (size // 4 if is_long else size,))
    short = T5_LENGTH if encoder == "t5" else min(CLIP_LENGTH, int(tokens.lengths[rows].max()) + 2)
    return tokens.batch(rows, CLIP_LENGTH if is_long else short)


def _learning_rate(step: int, steps: int) -> float:
    warm_up = min(WARM_UP, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))


def make_encoder(
    encoder: str, out: Path, steps: int, seed: int, captions: int = CAPTIONS, batch_size: int = BATCH_SIZE
) -> list[float]:
    """Train one encoder, and write it and its tokenizer below `out`. Return the losses."""
    tokenizer_folder, model_folder = ENCODERS[encoder]
    with new_folder(out / tokenizer_folder) as folder:
        write_tokenizer(encoder, folder)
    tokenizer = load_tokenizer(encoder, out / tokenizer_folder)
    chance = random.Random(seed)
    tokens = tokenize([random_caption(chance) for _ in range(captions)], encoder, tokenizer)
    torch.manual_seed(seed)
    model: Any = new_encoder(encoder, tokenizer)
    losses: list[float] = []
    with tqdm(train(encoder, model, tokens, steps, seed, batch_size), total=steps, desc=encoder, mininterval=1) as bar:
        for loss in bar:
            losses.append(loss)
            bar.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.3f}", refresh=False)
    with new_folder(out / model_folder) as folder, no_progress_bars():
        model.save_pretrained(folder, safe_serialization=True)
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where the six folders go")
    parser.add_argument("--steps", type=int, default=2400, help="training steps per encoder (2400)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=ENCODERS, help="one encoder; the others and the probes are left out")
    arguments = parser.parse_args()
    for encoder in [arguments.only] if arguments.only else ENCODERS:
        make_encoder(encoder, arguments.out, arguments.steps, arguments.seed)
    if not arguments.only:
        print(table(probe(arguments.out, torch.float16)))


if __name__ == "__main__":
    main()
