"""Every preset completes on a GPU of the size that `sd3tune plan` says it needs: T5, VAE, training and previews.

The base has its full size and no weights. torch's allocator is the real one, with its fragmentation.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sd3tune.commands.plan import make_run_plan
from sd3tune.config import load_config
from tests.nullgpu.programs.preset import ROOT, overrides
from tests.nullgpu.run import Ran
from tests.nullgpu.sparse_base import write_sparse_base

PROGRAM = Path(__file__).with_name("programs") / "preset.py"
PRESETS = [
    # Without T5, training is the largest phase. It dies here if segments do not grow.
    ("sd35_medium_24gb", "train.batch_size=2", "model.t5=false"),
    ("sd35_medium_6gb", "model.t5=false"),  # it has T5 on the CPU, which would compute
    ("sd35_medium_12gb",),
    ("sd35_medium_16gb", "model.t5=false"),  # with T5, the limit would not be training's
    ("sd35_medium_24gb",),
    ("sd35_medium_48gb", "train.batch_size=8"),
    ("sd35_medium_t4",),
    ("sd35_large_12gb",),
    ("sd35_large_48gb",),
]
T4 = "sd35_medium_t4"


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    written: dict[tuple[str, torch.dtype], Path] = {}

    def base(preset: str) -> Path:
        kind = ("sd35-large" if "large" in preset else "sd35-medium", torch.float16 if preset == T4 else torch.bfloat16)
        if kind not in written:
            written[kind] = write_sparse_base(tmp_path_factory.mktemp("bases"), *kind)
        return written[kind]

    return base


@pytest.mark.long
@pytest.mark.parametrize("preset", PRESETS, ids=" ".join)
def test_every_preset_trains_where_the_plan_says_so(null_gpu, base_of, tmp_path: Path, preset: tuple[str, ...]) -> None:
    completes_at_its_limit(null_gpu, base_of(preset[0]), tmp_path, *preset)


@pytest.mark.long
def test_so_does_a_whole_model_with_previews_validation_and_checkpoints(null_gpu, tmp_path: Path) -> None:
    """Six blocks, updated in the backward pass: as on 24 GB with all 24, which would write 22 GB of checkpoints."""
    base = write_sparse_base(tmp_path / "base", "sd35-medium", torch.bfloat16, blocks=6)
    more = (
        "method={kind: full}", "ema=null", "optimizer.kind=adamw8bit", "train.gradient_checkpointing=block",
        "train.max_grad_norm=null", "train.fused_backward=true", "train.gradient_accumulation=1", "model.t5=false",
        "preview.prompts=[a dog]", "validation={holdout: 1, every: 2}",
    )  # fmt: skip
    ran = completes_at_its_limit(null_gpu, base, tmp_path, "sd35_medium_24gb", *more)
    assert "no preview, out of memory" not in ran.out + ran.err


def completes_at_its_limit(null_gpu, base: Path, folder: Path, preset: str, *more: str) -> Ran:
    config = load_config(ROOT / "configs" / f"{preset}.yaml", [*overrides(base), *more]).config
    limit = make_run_plan(config, "t4" if preset == T4 else "h100").needed / 1e9
    capability = 75 if preset == T4 else 90
    cache = {"SD3TUNE_CACHE": str(folder / "cache")}
    ran = null_gpu(
        PROGRAM, folder, preset, base, *more, gb=limit, capability=capability, timeout=1800.0, **cache
    ).succeeded()
    assert ran.facts["outcome"] == "finished", (limit, ran.err[-1000:])
    assert ran.facts["expandable"]
    return ran
