"""How much of a caption a linear probe reads out of nano's text encoders, on combinations that never were trained on.

python -m examples.nano.probe_text_encoders data/nano/parts

The probes are fitted to captions of the training kind; accuracies are for scenes with a held-out combination.
The weights are rounded to fp16 first, as they are shipped.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Mapping
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
"""By what is read from, then by what is read."""


def probe(parts: Path, dtype: torch.dtype, captions: int = CAPTIONS, seed: int = 1) -> Accuracies:
    """Fit linear probes to fresh captions, read as many held-out ones; weights are rounded to `dtype` first."""
    sides = [_read(parts, dtype, captions, seed, held_out) for held_out in (False, True)]
    (features, targets, sizes), (held_out_features, held_out_targets, _) = sides
    return {
        source: _accuracy(
            (features[source], targets[source]), (held_out_features[source], held_out_targets[source]), sizes[source]
        )
        for source in features
    }


@torch.no_grad()
def _read(
    parts: Path, dtype: torch.dtype, captions: int, seed: int, held_out: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, dict[str, int]]]:
    """By source: features [N, D], targets [N, questions], and the questions with their numbers of answers."""
    chance = random.Random(f"{seed}/{held_out}")
    told = [random_caption(chance, held_out) for _ in range(captions)]
    features: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    whole = {slot: len(values) for slot, values in SLOTS.items()}
    sizes: dict[str, dict[str, int]] = {}
    pooled_by_encoder = []
    for encoder, (tokenizer_folder, model_folder) in ENCODERS.items():
        model = load_encoder(encoder, parts / model_folder).to(dtype).float()
        tokens = tokenize(told, encoder, load_tokenizer(encoder, parts / tokenizer_folder))
        length = T5_LENGTH if encoder == "t5" else CLIP_LENGTH
        batch = tokens.batch(torch.arange(captions), length)
        read = [states(encoder, model, ids) for ids in batch.ids.split(500)]
        hidden = torch.cat([part for part, _ in read])
        pooled_by_encoder += [torch.cat([part for _, part in read])] if encoder != "t5" else []
        words = batch.is_word & (batch.owners > 0) & (batch.own[..., 1] > 0)  # those that know their shape
        found = {
            f"{encoder} mean": (hidden.mean(1), batch.whole, whole),
            f"{encoder} last": (hidden[:, -1], batch.whole, whole),
            f"{encoder} words": (hidden[words], batch.own[words], {slot: len(SLOTS[slot]) for slot in OWN}),
        }
        for source, (feature, target, size) in found.items():
            features[source], targets[source], sizes[source] = feature, target, size
        targets["pooled"], sizes["pooled"] = batch.whole if encoder != "t5" else targets["pooled"], whole
    features["pooled"] = torch.cat(pooled_by_encoder, dim=-1)
    return features, targets, sizes


def _accuracy(
    fitted: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], sizes: Mapping[str, int]
) -> dict[str, float]:
    """Logistic regression of all questions at once; of each the share of right answers on the held-out side."""
    mean, std = fitted[0].mean(0), fitted[0].std(0) + 1e-6
    weight = torch.zeros(fitted[0].shape[1] + 1, sum(sizes.values()), requires_grad=True)
    inputs, held_out_inputs = (F.pad((side[0] - mean) / std, (0, 1), value=1.0) for side in (fitted, held_out))
    optimizer = torch.optim.LBFGS([weight], max_iter=150, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        answers = zip((inputs @ weight).split(list(sizes.values()), dim=1), fitted[1].unbind(1), strict=True)
        total = sum(F.cross_entropy(answer, target) for answer, target in answers) + 1e-4 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    with torch.no_grad():
        answers = zip((held_out_inputs @ weight).split(list(sizes.values()), dim=1), held_out[1].unbind(1), strict=True)
        right = [(answer.argmax(1) == target).float().mean().item() for answer, target in answers]
    return dict(zip(sizes, right, strict=True))


def table(accuracies: Accuracies) -> str:
    """A Markdown table: a row for each question, a column for each source, in per cent."""
    lines = [f"| | {' | '.join(accuracies)} |", "|---|" + "---|" * len(accuracies)]
    for slot in SLOTS:
        cells = [f"{100 * read[slot]:.1f}" if slot in read else "" for read in accuracies.values()]
        lines.append(f"| {slot.replace('_', ' ')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("parts", type=Path, help="the folder that holds text_encoder, tokenizer and so on")
    parser.add_argument("--captions", type=int, default=CAPTIONS, help=f"to fit to, and to read ({CAPTIONS})")
    parser.add_argument("--fp32", action="store_true", help="do not round the weights to fp16")
    arguments = parser.parse_args()
    dtype = torch.float32 if arguments.fp32 else torch.float16
    print(table(probe(arguments.parts, dtype, arguments.captions)))


if __name__ == "__main__":
    main()
