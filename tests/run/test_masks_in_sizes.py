"""Masks stay with their photos and captions in several sizes, through shuffles, crops and flips, on two ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from PIL import Image

from sd3tune.run.batches import make_batches
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE

LEVELS = {"0": 0, "1": 80, "2": 255}
"""Photo -> grey of the left half of its mask; the right half is white."""


def test_masks_and_captions_stay_with_their_photos(quick_config, tmp_path: Path) -> None:
    for number, (name, level) in enumerate(LEVELS.items()):
        size = (128, 128) if number else (112, 160)
        Image.new("RGB", size, (80 * number, 20, 200)).save(tmp_path / f"{name}.png")
        mask = Image.new("L", size, 255)
        mask.paste(level, (0, 0, size[0] // 2, size[1]))
        mask.save(tmp_path / f"{name}_mask.png")
        (tmp_path / f"{name}.txt").write_text(f"photo {name}")
    config = quick_config(
        tmp_path / "run", f"data.sources=[{{path: {tmp_path}, outside_weight: 0}}]", "data.resolution=[64, 96]",
        "data.flip=true", "data.crop_variants=2",
    )  # fmt: skip
    plan = make_plan(config, torch.device("cpu"), None, 2)
    encoded = encode(plan, ALONE, lambda line: None)
    captions = {name: encoded.store.get(encoded.captions["clip_l"][f"photo {name}"])["pooled"] for name in LEVELS}
    seen = set()
    for rank in (0, 1):
        batches = make_batches(plan, encoded, dataclasses.replace(ALONE, rank=rank, world=2))
        for step in range(12):
            batch = batches.fetch(step, 0)
            name = Path(batch.names[0]).stem
            assert torch.equal(batch.embeddings["clip_l"]["pooled"][0], captions[name])
            weights = batch.position_weights[0]
            assert weights.shape == batch.latents.shape[2:]
            assert abs(weights.min() / weights.max() - LEVELS[name] / 255) < 0.01
            seen.add((name, batch.size))
        batches.close()
    assert {size for _, size in seen} >= {(64, 64), (96, 96)}
    assert len(seen) == 6
