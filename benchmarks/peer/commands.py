"""The same work as two commands: `sd3tune train` with a YAML, and the script with its flags."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peer.cells import BATCH_SIZE, LEARNING_RATE, RANK, T5_TOKENS, TARGETS, PeerCell
from benchmarks.peer.materials import CAPTION, Materials

NEVER = 10**9
MIXED_PRECISION = {"fp32": "no", "bf16": "bf16"}


def our_arguments(cell: PeerCell, materials: Materials, store: Path, run: Path) -> list[str]:
    """Return the arguments of `python -m sd3tune`; writes the YAML beside the run folder."""
    source = {"path": str(materials.captioned)} if cell.has_own_captions else _one_caption(materials)
    config = {
        "name": "cell",
        "output_dir": str(run),
        "model": {
            "base": str(materials.bases[cell.base]),
            "dtype": cell.dtype,
            "max_sequence_length": T5_TOKENS,
        },
        "method": {"rank": RANK, "alpha": float(RANK), "init": "gaussian", "targets": list(TARGETS)},
        "data": {
            "sources": [source],
            "resolution": cell.size.resolution,
            "buckets": False,
            "cache_dir": str(store),
        },
        "optimizer": {"lr": LEARNING_RATE},
        "train": {"steps": cell.size.steps, "batch_size": BATCH_SIZE},
        "checkpoint": {"every": NEVER},
    }
    file = run.with_suffix(".yaml")
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")  # JSON is YAML
    return ["train", str(file)]


def peer_arguments(cell: PeerCell, materials: Materials, cache: Path, run: Path) -> list[str]:
    """Return the arguments of `python script`: a plain velocity loss, no validation and no intermediate checkpoints.

    `cache` is the datasets library's cache of the captioned photos; it may exist already.
    """
    data = ["--instance_data_dir", str(materials.photos)]
    if cell.has_own_captions:
        data = ["--dataset_name", str(materials.captioned), "--caption_column", "text", "--cache_dir", str(cache)]
    return [
        *("--pretrained_model_name_or_path", str(materials.bases[cell.base])),
        *data,
        *("--instance_prompt", CAPTION),
        *("--output_dir", str(run)),
        *("--resolution", str(cell.size.resolution), "--center_crop"),
        *("--train_batch_size", str(BATCH_SIZE), "--max_train_steps", str(cell.size.steps)),
        *("--rank", str(RANK), "--learning_rate", str(LEARNING_RATE), "--lr_warmup_steps", "0"),
        *("--max_sequence_length", str(T5_TOKENS)),
        *("--weighting_scheme", "logit_normal", "--precondition_outputs", "0"),
        *("--mixed_precision", MIXED_PRECISION[cell.dtype]),
        *("--checkpointing_steps", str(NEVER)),
        *("--seed", "0"),
        *(["--cache_latents"] if cell.captions == "one-cached" else []),
    ]


def _one_caption(materials: Materials) -> dict[str, str]:
    return {"path": str(materials.photos), "caption": CAPTION}
