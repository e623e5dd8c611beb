"""EVA (Paischer et al. 2024): A starts as the principal directions of its module's input over some training batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack

import torch
from peft.utils.incremental_pca import IncrementalPCA
from torch import Tensor, nn

from sd3tune.errors import AdapterError


@torch.no_grad()
def input_directions(
    transformer: nn.Module, ranks: Mapping[str, int], observe: Callable[[], object]
) -> dict[str, Tensor]:
    """Return module -> its input's first principal components [rank, in], orthonormal, fp32.

    `observe()` runs some batches through the model. PEFT's incremental PCA stores only the components. Modules with the
    same input tensor, such as q, k and v, share one. Ranks do not change (PEFT's rho = 1), unlike in the paper, where
    modules compete for them. Raises AdapterError if a batch has too few vectors.
    """
    inputs = _Inputs(ranks)
    with ExitStack() as stack:
        for name in ranks:
            hook = transformer.get_submodule(name).register_forward_pre_hook(inputs.hook(name))
            stack.callback(hook.remove)
        observe()
    return {name: inputs.components[inputs.leader[name]].components_[:rank].float() for name, rank in ranks.items()}


class _Inputs:
    def __init__(self, ranks: Mapping[str, int]) -> None:
        self.ranks = ranks
        self.leader: dict[str, str] = {}
        """Module -> the first module with the same input tensor."""
        self.components: dict[str, IncrementalPCA] = {}
        self._last: tuple[Tensor | None, str] = (None, "")

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            rows = arguments[0].flatten(0, -2)
            same, leader = self._last
            if arguments[0] is not same:
                leader = name
                self._last = (arguments[0], name)
            if self.leader.setdefault(name, leader) != leader:
                raise RuntimeError(f"{name} shares its input with another module in some batches only")
            self._check(name, rows)
            if leader == name:
                self._components(name, rows).partial_fit(rows.float())

        return see

    def _components(self, leader: str, rows: Tensor) -> IncrementalPCA:
        """Return the components of an input, as many as the largest rank of the modules that share it."""
        if leader not in self.components:
            count = min(max(self.ranks.values()), *rows.shape)
            self.components[leader] = IncrementalPCA(
                count, lowrank=True, lowrank_q=min(2 * count, *rows.shape), lowrank_seed=0
            )
        return self.components[leader]

    def _check(self, name: str, rows: Tensor) -> None:
        known = self.components.get(self.leader[name])
        if min(rows.shape) < self.ranks[name] or (known is not None and len(rows) < known.n_components):
            raise AdapterError(
                f"method.init: eva needs at least as many vectors and features as the rank, {self.ranks[name]}, and "
                f"{name} sees {rows.shape[0]} vectors of {rows.shape[1]} in a batch; lower method.rank "
                "(with rank: auto, method.budget_mb), or raise train.batch_size"
            )
