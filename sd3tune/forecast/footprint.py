"""What a computation costs: the bytes that are alive at once, and its matrix products, counted while it runs.

It may run on real tensors or on the meta device, where nothing is computed and a model of 8 billion parameters takes
no memory; the counts are the same.
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
    """While it is entered, follows every tensor that is made: `peak` is the most bytes that were alive at once.

    Tensors that were there before do not count, nor does what a kernel takes for itself inside. A storage counts once,
    however many tensors look at it. `flops` counts two operations for each multiplication and addition of matrix
    products, convolutions and attention (torch's own formulas, `torch.utils.flop_counter`).
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
                made = [tensor for tensor in made if _key(tensor) not in given]  # else a view of what was there before
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
        """Return the most bytes that were alive at once since the last lap, and begin another one."""
        highest, self._highest = self._highest, self.now
        return highest


@dataclass(frozen=True)
class _Result:
    """The form of what a kernel returns on the meta device: new tensors, one or a tuple or list of them."""

    kind: type
    forms: list[tuple[torch.Size, tuple[int, ...], torch.dtype]]
    flops: int

    def make(self) -> Any:
        made = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in self.forms]
        return made[0] if self.kind is Tensor else self.kind(made)


_RESULTS: dict[Any, _Result] = {}
"""By the kernel and the forms of its arguments. Torch works most of them out in Python, which takes far longer."""


def _call_on_meta(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """What a call's result depends on; None where it may be a view or change its arguments, or has real tensors."""
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
    """Whether it consists of whole storages of the meta device, each of its own."""
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
    """While the context lasts, attention on the meta device takes a kernel that a GPU would take: one that forms no
    matrix of all pairs of tokens. torch itself forms it where it sees no GPU. A masked attention stays as it is.

    The function is exchanged, as a mode of torch would not reach the blocks that a backward pass computes again.
    """
    plain = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *masks: Any, **options: Any) -> Tensor:
        if not (query.is_meta and _is_plain(*masks, **options)):
            return plain(query, key, value, *masks, **options)
        if query.shape[-1] <= _WIDEST_FLASH:
            return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, False)[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


def _is_plain(attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False, **_: object) -> bool:
    return attn_mask is None and not dropout_p and not is_causal


class SavedTensors:
    """Bytes that autograd keeps for the backward pass: distinct storages, those of `known` tensors left out.

    It holds on to none of them, so it is right for one forward pass, during which none of them goes.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {_key(tensor) for tensor in known}
        self._found: dict[int, int] = {}

    @property
    def nbytes(self) -> int:
        return sum(self._found.values())

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """While the context lasts, what a forward pass saves is counted."""
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        if _key(tensor) not in self._known:
            self._found[_key(tensor)] = tensor.untyped_storage().nbytes()
        return tensor


def _key(tensor: Tensor) -> int:
    """Which storage a tensor looks at."""
    key: int = tensor.untyped_storage()._cdata
    return key


def peak_of(compute: Callable[[], object]) -> Footprint:
    """The footprint of one call."""
    with fused_attention(), Footprint() as footprint:
        compute()
    return footprint


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors' storages; what several of them share counts once."""
    return sum({_key(tensor): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def tensors_of(model: nn.Module) -> list[Tensor]:
    """A model's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]
