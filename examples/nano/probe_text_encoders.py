"""Measure how much of a caption a linear probe reads from nano's text encoders, on held-out combinations.

python -m examples.nano.probe_text_encoders data/nano/parts

The probes are fitted to captions of the training mix; accuracies are for scenes with a held-out combination.
The weights are rounded to fp16 first, as they are shipped.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from examples.nano.captions import SLOTS, random_caption
from examples.nano.text_encoders import (
    CLIP_LENGTH,
    ENCODERS,
    OWN,
    T5_LENGTH,
    load_encoder,
    load_tokenizer,
    states,
    tokenize,
)

CAPTIONS = 6000
Accuracies = dict[str, dict[str, float]]
"""Source -> question -> accuracy."""


@dataclass
class Exam:
    """Inputs of a probe [N, D], the right answers [N, questions], and the questions with their numbers of answers."""

    features: Tensor
    answers: Tensor
    questions: dict[str, int]

    def right(self, logits: Tensor) -> dict[str, float]:
        """Return the share of right answers per question; logits are [N, sum of the numbers of answers]."""
        given = [part.argmax(1) for part in logits.split(list(self.questions.values()), dim=1)]
        shares = (torch.stack(given, dim=1) == self.answers).float().mean(0).tolist()
        return dict(zip(self.questions, shares, strict=True))

    def loss(self, logits: Tensor) -> Tensor:
        """Return the cross entropy, summed over the questions."""
        parts = logits.split(list(self.questions.values()), dim=1)
        pairs = zip(parts, self.answers.unbind(1), strict=True)
        return torch.stack([F.cross_entropy(part, answers) for part, answers in pairs]).sum()


def probe(parts: Path, dtype: torch.dtype, captions: int = CAPTIONS, fitting_steps: int = 150) -> Accuracies:
    """Fit linear probes to new captions, and test them on as many held-out ones, with weights rounded to `dtype`."""
    fitted, held_out = (exams_of(parts, dtype, captions, held_out) for held_out in (False, True))
    return {source: _accuracy(fitted[source], held_out[source], fitting_steps) for source in fitted}


@torch.no_grad()
def exams_of(parts: Path, dtype: torch.dtype, captions: int, held_out: bool) -> dict[str, Exam]:
    """Return source -> exam; "words" are the tokens of things with a named shape."""
    chance = random.Random(f"probe/{held_out}")
    texts = [random_caption(chance, held_out) for _ in range(captions)]
    whole = {slot: len(values) for slot, values in SLOTS.items()}
    exams: dict[str, Exam] = {}
    pooled: list[Tensor] = []
    for encoder, (tokenizer_folder, model_folder) in ENCODERS.items():
        model = load_encoder(encoder, parts / model_folder).to(dtype).float()
        tokens = tokenize(texts, encoder, load_tokenizer(encoder, parts / tokenizer_folder))
        batch = tokens.batch(torch.arange(captions), T5_LENGTH if encoder == "t5" else CLIP_LENGTH)
        read = [states(encoder, model, ids) for ids in batch.ids.split(500)]
        hidden = torch.cat([part for part, _ in read])
        pooled += [torch.cat([part for _, part in read if part is not None])] if encoder != "t5" else []
        words = batch.is_word & (batch.own[..., OWN.index("shape")] > 0)
        exams[f"{encoder} mean"] = Exam(hidden.mean(1), batch.whole, whole)
        exams[f"{encoder} last"] = Exam(hidden[:, -1], batch.whole, whole)
        exams[f"{encoder} words"] = Exam(hidden[words], batch.own[words], {slot: whole[slot] for slot in OWN})
    return {"pooled": Exam(torch.cat(pooled, dim=1), exams["clip_g mean"].answers, whole), **exams}


def _accuracy(fitted: Exam, held_out: Exam, steps: int) -> dict[str, float]:
    """Fit a logistic regression for all questions at once. Return its accuracies on the held-out side."""
    mean, std = fitted.features.mean(0), fitted.features.std(0) + 1e-6
    inputs, held_out_inputs = (F.pad((exam.features - mean) / std, (0, 1), value=1.0) for exam in (fitted, held_out))
    weight = torch.zeros(inputs.shape[1], sum(fitted.questions.values()), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        total = fitted.loss(inputs @ weight) + 1e-4 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return held_out.right(held_out_inputs @ weight.detach())


def table(accuracies: Accuracies) -> str:
    """Return a Markdown table in per cent: a row per question, a column per source."""
    lines = [f"| | {' | '.join(accuracies)} |", "|---|" + "---|" * len(accuracies)]
    for slot in SLOTS:
        cells = [f"{100 * read[slot]:.1f}" if slot in read else "" for read in accuracies.values()]
        lines.append(f"| {slot.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", type=Path, help="the folder that holds text_encoder, tokenizer and so on")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help=f"to fit to, and to read ({CAPTIONS})")
    parser.add_argument("--fp32", action="store_true", help="do not round the weights to fp16")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.fp32 else torch.float16
    print(table(probe(arguments.parts, dtype, arguments.captions)))


if __name__ == "__main__":
    main()
