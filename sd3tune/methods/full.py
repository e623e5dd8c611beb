"""Full fine-tuning of the transformer or, from random weights, training from scratch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.config.meaning import contract_of, identity_of
from sd3tune.config.schema import Config
from sd3tune.config.sections.masks import any_keeps_base
from sd3tune.config.sections.method import FullConfig
from sd3tune.methods.base import Product, Saving, Weights
from sd3tune.methods.stored_text import StoredText
from sd3tune.model.base.base import Base
from sd3tune.model.base.folder import check_parts, write_model
from sd3tune.model.base.parts import INDEX_FILE
from sd3tune.model.compute.fast import plain_path
from sd3tune.model.compute.sharding import is_divided, overwrite_rows
from sd3tune.model.load.components import load_scheduler, load_transformer
from sd3tune.model.lora.targets import ELSEWHERE, CoverageRow, block_of, inside_blocks
from sd3tune.runtime.device import DTYPES


class FullMethod(StoredText):
    """See `methods.base.Method`.

    The untrained base is needed two or three times a run: first preview, first held-out loss, closing report. It is
    loaded to system memory each time. If its prediction is the target of every step, it stays on the device.
    """

    product = Product("model", INDEX_FILE)
    block_measure = "relative change per block"
    remedy = "method.export_dtype"

    def __init__(self, config: Config, base: Base) -> None:
        super().__init__(config.model)
        self.settings = cast(FullConfig, config.method)
        self.base, self.flow_shift = base, config.flow.shift
        self.export_dtype = DTYPES[self.settings.export_dtype]
        self.exported_bytes = self.export_dtype.itemsize
        self._caches_base = bool(config.data.own_predictions) or any_keeps_base(config.data.sources)
        self._cached_base: dict[str, Tensor] | None = None
        self._buffers: dict[str, Tensor] = {}

    def select(self, transformer: nn.Module) -> list[str]:
        check_parts(self.base)
        inside = inside_blocks(transformer, self.settings.blocks)
        owners = [name for name, module in transformer.named_modules() if list(module.parameters(recurse=False))]
        return [name for name in owners if inside(name)]

    def coverage(self, transformer: nn.Module) -> list[CoverageRow]:
        inside = inside_blocks(transformer, self.settings.blocks)
        parts: dict[str, list[tuple[str, int, bool]]] = {}  # block, parameters, whether they are trained
        for name, parameter in transformer.named_parameters():
            block = block_of(name)
            part = ELSEWHERE if block == ELSEWHERE else name.split(".")[2]
            parts.setdefault(part, []).append((block, parameter.numel(), inside(name)))
        rows = []
        for part, found in parts.items():
            present, trained = {block for block, _, _ in found}, {block for block, _, inside in found if inside}
            parameters = sum(count for _, count, inside in found if inside)
            rows.append(CoverageRow(part, len(trained), len(present), parameters, part != ELSEWHERE))
        return [row for row in rows if row.trained]

    def title(self) -> str:
        return "full, from scratch" if self.base.random else "full"

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        """Make the parameters trainable. The fp32 master starts from the base's exact values, not from rounded ones.

        With `blocks`, the others are frozen, and rounded as they are exported.
        """
        dtype = transformer.dtype
        exact = transformer
        if dtype is not torch.float32:
            exact = load_transformer(self.base, torch.float32, transformer.device)
        inside = inside_blocks(transformer, self.settings.blocks)
        trained: dict[str, nn.Parameter] = {}
        exact_parameters = dict(exact.named_parameters())
        for name, parameter in transformer.named_parameters():  # a rehearsal leaves blocks out
            parameter.requires_grad_(inside(name))
            if inside(name):
                trained[name] = parameter
                parameter.data = exact_parameters[name].data
            else:
                parameter.data = exact_parameters[name].data.to(self.export_dtype).to(dtype)
        saved = exact.state_dict()
        live = dict(transformer.named_buffers())
        for name in (name for name in live if name in saved):
            self._buffers[name] = self._for_export(saved[name])
            live[name].data = saved[name].to(self.export_dtype).to(dtype)
        return trained

    def initialize_from_data(
        self, transformer: SD3Transformer2DModel, observe: Callable[[], object], reduce_mean: Callable[[Tensor], Tensor]
    ) -> None:
        """Do nothing: the initial weights do not depend on data."""

    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> AbstractContextManager[None]:
        return nullcontext()

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        trained = {name: self._for_export(value) for name, value in weights.items()}
        return self._frozen_parameters(trained.keys()) | trained | self._buffers

    def _frozen_parameters(self, trained: Collection[str]) -> dict[str, Tensor]:
        """Return the base's other parameters as they are exported."""
        if self.settings.blocks is None:
            return {}
        base = load_transformer(self.base, self.export_dtype)
        return {name: parameter.data for name, parameter in base.named_parameters() if name not in trained}

    def _for_export(self, value: Tensor) -> Tensor:
        """Return a tensor as it is exported, in system memory: the GPU may lack the room for all of them."""
        exported = value.to(self.export_dtype)
        return exported if exported.is_meta else exported.cpu()

    def as_exported(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None]:
        def exported(name: str) -> Tensor | None:
            return weights[name].to(self.export_dtype) if name in weights else None

        return _other_weights(transformer, exported, in_place=True)

    def disabled(self, transformer: SD3Transformer2DModel) -> AbstractContextManager[None]:
        return _other_weights(transformer, self._untrained(transformer).get, in_place=not self._caches_base)

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        changes: dict[str, float] = {}
        sizes: dict[str, float] = {}
        for name, start in load_transformer(self.base, torch.float32).named_parameters():
            if name not in weights:
                continue
            block = block_of(name)
            change = weights[name].cpu() - start
            changes[block] = changes.get(block, 0.0) + change.double().square().sum().item()
            sizes[block] = sizes.get(block, 0.0) + start.double().square().sum().item()
        return {block: (changes[block] / sizes[block]) ** 0.5 if sizes[block] else 0.0 for block in changes}

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        return write_model(folder, self.base, self.exported(weights), contract, self.sampling_shift())

    def sampling_shift(self) -> float | None:
        shift = self.flow_shift
        return shift if isinstance(shift, float) and shift != load_scheduler(self.base).config.shift else None

    def infer_arguments(self, run: Path) -> list[str]:
        return ["--base", str(run / self.product.name)]

    def contract(self) -> dict[str, Any]:
        start = "random" if self.base.random else "pretrained"
        blocks = {} if self.settings.blocks is None else {"blocks": self.settings.blocks}
        return {"method": self.settings.kind, "init": start, **contract_of(self.settings), **blocks}

    def identity(self) -> dict[str, Any]:
        return identity_of(self.settings, {"blocks": {}} if self.settings.blocks is None else {})

    def savings(self, config: Config) -> Sequence[Saving]:
        eight = Saving("optimizer", "kind", "adamw8bit", "6 bytes less for each parameter", planned=False)
        words = "no gradient of the whole model is kept, or clipped"
        fused = Saving("train", "fused_backward", True, words, needs={"max_grad_norm": None})
        is_open = not config.train.fused_backward and config.train.gradient_accumulation == 1
        can_fuse = is_open and config.optimizer.updates_in_slices
        return (*[fused] * can_fuse, *[eight] * config.optimizer.moments)

    def _untrained(self, transformer: SD3Transformer2DModel) -> dict[str, Tensor]:
        if self._cached_base is not None:
            return self._cached_base
        device = transformer.device if self._caches_base else "cpu"
        base = load_transformer(self.base, transformer.dtype, device).state_dict()
        if self._caches_base:
            self._cached_base = base
        return base


@contextmanager
def _other_weights(
    transformer: SD3Transformer2DModel, values: Callable[[str], Tensor | None], in_place: bool
) -> Iterator[None]:
    """Compute with other parameters and buffers while the context lasts; None keeps the live value.

    `in_place` overwrites live values of a GPU in 16 bits, which then wait in system memory, so that the GPU does not
    hold both. Others are never written to: in fp32 they may be the master itself. Of a divided parameter, whose values
    are a copy, this process's rows are overwritten.
    """
    with ExitStack() as stack:
        for name, tensor in chain(transformer.named_parameters(), transformer.named_buffers()):
            value = values(name)
            if value is not None:
                stack.callback(_replacement(tensor, in_place)(tensor, value))
        with plain_path(transformer):
            yield


def _replacement(tensor: Tensor, in_place: bool) -> Callable[[Tensor, Tensor], Callable[[], object]]:
    """Return the function that replaces a tensor's values, and returns the one that restores them."""
    if is_divided(tensor):
        return overwrite_rows
    return _overwrite if in_place and _can_overwrite(tensor) else _repoint


def _can_overwrite(tensor: Tensor) -> bool:
    return not tensor.is_cpu and tensor.dtype is not torch.float32


def _overwrite(tensor: Tensor, value: Tensor) -> Callable[[], object]:
    """Write `value` into a tensor. Return the function that restores it."""
    live = tensor.data if tensor.is_meta else tensor.data.to("cpu", copy=True)
    tensor.data.copy_(value)
    return lambda: tensor.data.copy_(live)


def _repoint(tensor: Tensor, value: Tensor) -> Callable[[], object]:
    """Let a tensor share the memory of `value`, or of a copy of it. Return the function that restores it."""
    live, tensor.data = tensor.data, _aligned(value.to(tensor.device, tensor.dtype))
    return lambda: setattr(tensor, "data", live)


def _aligned(value: Tensor) -> Tensor:
    """Return the value 64-byte aligned: on unaligned views of the flat master, some CPU kernels round differently."""
    return value.clone() if value.device.type == "cpu" and value.data_ptr() % 64 else value
