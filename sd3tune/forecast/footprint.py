"""The cost of a computation: its peak memory and its operations, counted while it runs.

It may run on real tensors or on the meta device, where nothing is computed and an 8-billion-parameter model takes no
memory. The counts are the same.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_WIDEST_FLASH = 256  # a head's width; the VAE's one head has 512
_FORMULAS = {
    **flop_registry,
    torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm],  # the fast path adds products in place
}


class Footprint(TorchDispatchMode):
    """A context manager that tracks every new tensor: `peak` is the largest sum of bytes alive at once.

    Earlier tensors and the kernels' internal workspaces do not count. A storage counts once, however many tensors share
    it. `flops` counts two operations for each multiply-add of matrix products, convolutions and attention, with torch's
    formulas (`torch.utils.flop_counter`).
    """

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.flops = 0, 0, 0
        self._highest = 0  # since the last lap
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _call_on_meta(func, args, kwargs or {})
        known = None if call is None else _RESULTS.get(call)
        if known is not None:
            result, flops = known.make(), known.flops
            made = list(result) if isinstance(result, tuple | list) else [result]
        else:
            result = func(*args, **(kwargs or {}))
            formula = _FORMULAS.get(func._overloadpacket)
            flops = 0 if formula is None else formula(*args, **(kwargs or {}), out_val=result)
            leaves = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            made = [leaf for leaf in leaves if _key(leaf) not in self._alive]
            if made:
                given = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
                made = [tensor for tensor in made if _key(tensor) not in given]  # else a view of an argument
            if call is not None and len(made) == len(leaves) and _is_plain_result(result):
                _RESULTS[call] = _Result(type(result), [(t.shape, t.stride(), t.dtype) for t in leaves], flops)
        self.flops += flops
        for tensor in made:
            self._follow(tensor)
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        nbytes = storage.nbytes()

        def gone(_: object) -> None:
            del self._alive[key]
            self.now -= nbytes

        self._alive[key] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        self._highest = max(self._highest, self.now)

    def lap(self) -> int:
        """Return the peak in bytes since the last lap, and begin a new lap."""
        highest, self._highest = self._highest, self.now
        return highest


@dataclass(frozen=True)
class _Result:
    """The shapes and dtypes of a kernel's result on the meta device: a new tensor, or a tuple or list of them."""

    kind: type
    forms: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    flops: int

    def make(self) -> Any:
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in self.forms]
        return made[0] if self.kind is Tensor else self.kind(made)


_RESULTS: dict[Any, _Result] = {}
"""Cache by kernel and forms of its arguments. Torch derives most results in Python, which takes far longer."""


def _call_on_meta(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return the cache key of a call; None if it may return a view, change its arguments, or has real tensors."""
    if func._schema.is_mutable or any(of.alias_info is not None for of in func._schema.returns):
        return None
    try:
        call = (func, _form((args, tuple(kwargs.items()))))
        hash(call)
    except TypeError:
        return None
    return call


def _form(value: Any) -> Any:
    if isinstance(value, Tensor):
        if not value.is_meta:
            raise TypeError("a real tensor")
        return value.shape, value.stride(), value.dtype
    if isinstance(value, tuple | list):
        return tuple(map(_form, value))
    return type(value), value


def _is_plain_result(result: Any) -> bool:
    """Return whether each tensor of the result is on the meta device and fills a storage of its own."""
    tensors = list(result) if type(result) in (tuple, list) else [result]
    if not tensors or not all(type(tensor) is Tensor and tensor.is_meta for tensor in tensors):
        return False
    whole = all(
        torch.empty_strided(of.shape, of.stride(), dtype=of.dtype, device="meta").untyped_storage().nbytes()
        == of.untyped_storage().nbytes()
        for of in tensors
    )
    return whole and len({_key(tensor) for tensor in tensors}) == len(tensors)


@contextlib.contextmanager
def fused_attention() -> Iterator[None]:
    """Use a GPU's fused kernel for attention on the meta device, while the context lasts.

    Fused kernels form no token-by-token matrix; torch forms it if it finds no GPU. Masked attention is unchanged. The
    function is replaced, as a torch mode would not reach the blocks that a backward pass recomputes.
    """
    plain = F.scaled_dot_product_attention

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if not query.is_meta or attn_mask is not None or dropout_p:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.shape[-1] <= _WIDEST_FLASH:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False, 0.0, is_causal)[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class SavedTensors:
    """Bytes that autograd keeps for the backward pass, in distinct storages, without the `known` tensors.

    It holds no reference to them. The count is therefore valid for one forward pass, in which none is freed.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {_key(tensor) for tensor in known}
        self._found: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self._found.values())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count the tensors that a forward pass saves, while the context lasts."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._known:
            self._found[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def _key(tensor: Tensor) -> int:
    """Return the identity of a tensor's storage."""
    key: int = tensor.untyped_storage()._cdata
    return key


def peak_of(compute: Callable[[], object]) -> Footprint:
    """Return the footprint of one call."""
    with fused_attention(), Footprint() as footprint:
        compute()
    return footprint


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' storages; a shared storage counts once."""
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def tensors_of(model: nn.Module) -> list[Tensor]:
    """Return a model's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]
