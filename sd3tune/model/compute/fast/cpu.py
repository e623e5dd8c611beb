"""Attention in bf16 on the CPU by matrix products of oneDNN, one head at a time per thread.

torch's kernel spends more time around its matrix products than in them. Here the scores of a head are a product in
bf16, computed in the forward pass and again in the backward pass. The rounding of a score grows with its size, so the
product also subtracts from each row about the score where its weights concentrate. softmax is invariant to that shift,
and the scores that matter are then near zero, where bf16 is most precise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

THREADS = 2
"""Largest number of threads at which it was measured to be faster. Each thread needs memory for two heads' scores."""


def is_faster(query: Tensor) -> bool:
    """Return True if `Attention` pays off: bf16, few threads, and a CPU with bf16 products that torch can detect."""
    multiplies = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    has_few_threads = torch.get_num_threads() <= THREADS
    return query.is_cpu and query.dtype is torch.bfloat16 and has_few_threads and bool(multiplies())


class Attention(torch.autograd.Function):
    """softmax(query key^T / sqrt(width)) value, all [B, heads, tokens, width] in bf16."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output, centre = attention(query, key, value)
        ctx.save_for_backward(query, key, value, centre)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, centre = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        inputs = (*_centred(query, key, centre), query, key, value, gradient)
        gradients = [torch.empty_like(tensor) for tensor in (query, key, value)]

        def differentiate(weights: Tensor, towards: Tensor, *head: Tensor) -> None:
            long_q, long_k, q, k, v, g, towards_q, towards_k, towards_v = head
            _weigh(long_q, long_k, scale, out=weights)
            torch.mm(weights.T, g, out=towards_v)
            torch.mm(g, v.T, out=towards)
            torch._softmax_backward_data(towards, weights, -1, towards.dtype, grad_input=towards)
            torch.addmm(towards_q, towards, k, beta=0, alpha=scale, out=towards_q)
            torch.addmm(towards_k, towards.T, q, beta=0, alpha=scale, out=towards_k)

        _for_each_head(differentiate, _score_buffers(2, query, key), *inputs, *gradients)
        return gradients[0], gradients[1], gradients[2]


@torch.library.custom_op("sd3tune::attention_in_bf16", mutates_args=(), device_types="cpu")
def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return attention's output and `_centre`. As a registered operator, it counts as one kernel."""
    scale, centre = query.shape[-1] ** -0.5, _centre(query, key)
    output = torch.empty_like(query)

    def mix(weights: Tensor, long_q: Tensor, long_k: Tensor, v: Tensor, mixed: Tensor) -> None:
        torch.mm(_weigh(long_q, long_k, scale, out=weights), v, out=mixed)

    _for_each_head(mix, _score_buffers(1, query, key), *_centred(query, key, centre), value, output)
    return output, centre


OPERATION = torch.ops.sd3tune.attention_in_bf16.default


def _score_buffers(count: int, query: Tensor, key: Tensor) -> Tensor:
    """Return buffers for `count` times a head's scores per thread: [threads, count, queries, keys]."""
    return query.new_empty(torch.get_num_threads(), count, query.shape[2], key.shape[2])


def _for_each_head(work: Callable[..., None], buffers: Tensor, *tensors: Tensor) -> None:
    """Call `work(*buffers of the thread, *tensors of the head)` for every head, with the heads shared over threads.

    Each product runs on one thread, as two threads do not double the speed of a product.
    """
    threads, heads = len(buffers), list(zip(*map(_heads, tensors), strict=True))

    @torch.no_grad()
    def share(thread: int) -> None:
        for head in heads[thread::threads]:
            work(*buffers[thread], *head)

    futures: list[Future[None]] = []
    torch.set_num_threads(1)
    try:
        futures.extend(_workers().submit(share, thread) for thread in range(1, threads))
        share(0)
    finally:
        wait(futures)  # a starting worker sets the number for the whole process, so restore it last
        torch.set_num_threads(threads)
    for future in futures:
        future.result()


def _heads(states: Tensor) -> list[Tensor]:
    """Split [B, heads, tokens, width] into the heads of all samples, as views."""
    return [head for sample in states.unbind() for head in sample.unbind()]


@functools.cache
def _workers() -> ThreadPoolExecutor:
    """Return the additional threads, which start on first use and compute each product on one thread."""
    return ThreadPoolExecutor(THREADS - 1, "attention", initializer=torch.set_num_threads, initargs=(1,))


def _weigh(long_query: Tensor, long_key: Tensor, scale: float, out: Tensor) -> Tensor:
    """Write one head's attention weights, [queries, keys], to `out`, and return it."""
    torch.addmm(out, long_query, long_key.T, beta=0, alpha=scale, out=out)
    return torch.softmax(out, dim=-1, out=out)


def _centred(query: Tensor, key: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """Append a column to queries and keys that subtracts `centre` from their product."""
    return torch.cat([query, -centre], dim=-1), torch.cat([key, key.new_ones(*key.shape[:-1], 1)], dim=-1)


def _centre(query: Tensor, key: Tensor) -> Tensor:
    """Return the approximate weighted mean of each row's scores before division by sqrt(width), [B, heads, tokens, 1].

    Gaussian scores of mean m and variance s have the weighted mean m + s, which is rarely above the largest of n of
    them, m + sqrt(s) e(n). Where the estimate is wrong, a row's rounding is coarser; its weights stay correct.
    """
    scale, tokens = query.shape[-1] ** -0.5, key.shape[2]
    mean = key.mean(dim=2, keepdim=True)
    around = key - mean
    spread = around.transpose(2, 3) @ around / tokens
    along, average = (query @ torch.cat([spread, mean.transpose(2, 3)], dim=-1)).split([query.shape[-1], 1], dim=-1)
    variance = torch.linalg.vecdot(along, query).unsqueeze(-1).float().clamp(min=0)
    return average + torch.minimum(scale * variance, _largest(tokens) * variance.sqrt()).to(query.dtype)


def _largest(count: int) -> float:
    """Return the approximate largest of `count` (at least 3) standard Gaussian numbers (Cramér 1946, 28.6)."""
    root = math.sqrt(2 * math.log(count))
    return root - (math.log(math.log(count)) + math.log(4 * math.pi)) / (2 * root)
