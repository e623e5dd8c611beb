"""The interpreted tensors of an adapter file."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from sd3tune.adapter.lycoris import size_of

Pair = tuple[Tensor, Tensor]
"""A [r, in] and B [out, r] of a module."""


@dataclass(frozen=True)
class Contents:
    """The interpreted tensors of a file, and its faults."""

    layout: str
    """A name of `names.LAYOUTS`; empty if no key belongs to a known layout."""
    factors: dict[str, Pair]
    """diffusers' module name -> factors."""
    alphas: dict[str, float]
    """Module -> alpha stored as a tensor; the output is scaled by alpha / r."""
    unknown: dict[str, str]
    """Key that belongs to no module of SD3 -> its probable purpose."""
    broken: dict[str, str]
    """Module, by its name in the file -> its fault."""
    text: dict[str, str]
    """Key of a text encoder's tensor -> the text encoder."""
    text_factors: dict[str, Pair]
    """Module of a text encoder, named as in `text_layouts` -> factors; `alphas` may have its alpha."""
    unread: dict[str, str]
    """The part of `text` that is no complete LoRA of known modules."""
    for_diffusers: bool
    """True if all keys are diffusers' own."""
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    """Module -> DoRA's magnitude: [out], or [1, in] for one per input."""
    lycoris: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """diffusers' module name -> its parts of LoHa or LoKr, with the scale in the first one."""

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module -> (outputs, inputs)."""
        return {module: self.size(module) for module in (*self.factors, *self.lycoris)}

    def size(self, module: str) -> tuple[int, int]:
        """Return (outputs, inputs) of a module. Raises KeyError if it is not in the file."""
        if module in self.lycoris:
            return size_of(self.lycoris[module])
        down, up = self.factors[module]
        return len(up), down.shape[1]

    def __contains__(self, module: str) -> bool:
        return module in self.factors or module in self.lycoris
