"""The measured cells: bases, captions and precisions; and the compared metrics of a run."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

BATCH_SIZE, RANK, T5_TOKENS = 2, 4, 77
LEARNING_RATE = 1e-4
CORES = 2
TARGETS = (
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v"),
)
"""The modules that the script trains by default; sd3tune's default also includes `attn2`."""


@dataclass(frozen=True)
class Size:
    """The size of a base, and the length of its runs."""

    resolution: int
    steps: int
    warmup: int
    """Number of first steps that are not counted in images per second."""
    turn: int
    """Steps between swaps while images per second are measured."""


@dataclass(frozen=True)
class PeerCell:
    base: str
    captions: str
    dtype: str

    @property
    def name(self) -> str:
        return f"{self.base}-{self.dtype}-{self.captions}"

    @property
    def size(self) -> Size:
        return SIZES[self.base]

    @property
    def has_own_captions(self) -> bool:
        return self.captions == "per-image"

    @property
    def least_speedup(self) -> float:
        """Return the required images/s, as a multiple of the peer's."""
        return 1.5 if self.base == "tiny" and self.captions != "one-cached" else 1.0

    def target(self, metric: str) -> float:
        """Return the required ratio. On `tiny` the libraries use most of the memory on both sides."""
        if metric == "images_per_s":
            return self.least_speedup
        if metric == "peak_memory":
            return 1.0 if self.base == "tiny" else 1 / 0.7
        return 1 / 0.3 if metric == "warm_start" else 1.0


@dataclass(frozen=True)
class Metric:
    unit: str
    larger_is_better: bool


SIZES = {
    "tiny": Size(resolution=256, steps=41, warmup=11, turn=5),
    "small": Size(resolution=512, steps=12, warmup=2, turn=1),
    "real-encoders": Size(resolution=512, steps=6, warmup=2, turn=1),
}
CAPTIONS = {
    "one": "one caption",
    "one-cached": "one caption, the peer with --cache_latents",
    "per-image": "a caption per image",
}
_ROWS = [
    *itertools.product(("tiny", "small"), CAPTIONS, ("fp32", "bf16")),
    *itertools.product(("real-encoders",), ("one", "one-cached"), ("bf16",)),
]
CELLS = {cell.name: cell for cell in itertools.starmap(PeerCell, _ROWS)}
METRICS = {
    "images_per_s": Metric("images/s", larger_is_better=True),
    "peak_memory": Metric("MB", larger_is_better=False),
    "first_step": Metric("s", larger_is_better=False),
    "warm_start": Metric("s", larger_is_better=False),
    "wall": Metric("s", larger_is_better=False),
}
