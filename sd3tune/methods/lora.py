"""LoRA on the transformer and, if configured, on CLIP text encoders; other text comes from the store."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from sd3tune.adapter import file as adapter_io
from sd3tune.config.meaning import contract_of, identity_of
from sd3tune.config.schema import Config
from sd3tune.config.sections.method import LowRankSection
from sd3tune.errors import AdapterError
from sd3tune.files.regular import sha256_of
from sd3tune.methods.base import Embeddings, Product, Saving, Weights
from sd3tune.methods.start_from import check_start, starting_factors
from sd3tune.methods.stored_text import StoredText
from sd3tune.methods.text_encoders import TrainedEncoders
from sd3tune.methods.trained_text import TrainedText
from sd3tune.model.base.base import Base
from sd3tune.model.compute.fast import plain_path
from sd3tune.model.lora.dropout import SeededDropout
from sd3tune.model.lora.eva import input_directions
from sd3tune.model.lora.layers import (
    ADAPTER_NAME,
    Layer,
    block_norms,
    inject_lora,
    lora_layers,
    other_parameters,
)
from sd3tune.model.lora.ranks import Cost, equal_ranks, least, ranks_by_need
from sd3tune.model.lora.targets import CoverageRow, coverage, lora_parameters, select_modules, values_by_pattern
from sd3tune.runtime.device import DTYPES


class LoraMethod(StoredText):
    """See `methods.base.Method`."""

    product = Product("adapter", adapter_io.ADAPTER_FILE)
    block_measure = "norm of the weight update per block"
    remedy = "method.targets"
    dora = False
    """True if each layer also has a trained magnitude for each output."""

    def __init__(self, config: Config, base: Base | None = None) -> None:
        super().__init__(config.model)
        self.settings = cast(LowRankSection, config.method)
        self.export_dtype = DTYPES[self.settings.export_dtype]
        self.exported_bytes = self.export_dtype.itemsize
        self.text = self.trained_text(base)
        self.trained_encoders, self.segments = self.text.names, self.text.prefixes
        self.peak = config.optimizer.lr
        self.resident = ("transformer", *self.trained_encoders)
        self._ranks: dict[str, int] = {}
        """The ranks of `rank: auto`: equal ones until they are chosen."""
        self._has_chosen = False

    def trained_text(self, base: Base | None) -> TrainedText:
        """Return the trained part of the text encoders."""
        return TrainedEncoders(self.settings.trained_encoders, base)

    def select(self, transformer: nn.Module) -> list[str]:
        return [*self._select(transformer), *self.text.select(self._start)]

    def _select(self, transformer: nn.Module) -> list[str]:
        """Return the names of the transformer's modules to train."""
        modules = select_modules(transformer, self.settings.targets, self.settings.blocks)
        if self.is_automatic and not self._ranks:
            self._ranks = equal_ranks(*self._within_budget(transformer, modules))
        layers = self._layers(modules)
        if self._start:
            self._check_start(self._start, transformer, layers)
        return modules

    def _check_start(self, start: adapter_io.Adapter, transformer: nn.Module, layers: Mapping[str, Layer]) -> None:
        """Raise AdapterError if the training cannot go on from `start`."""
        check_start(start, transformer, layers, kind="dora" if self.dora else "lora")

    @property
    def is_automatic(self) -> bool:
        return self.settings.rank == "auto"

    def _within_budget(self, transformer: nn.Module, modules: Sequence[str]) -> tuple[dict[str, Cost], int]:
        """Return the costs of the modules, and the budget in parameters. Raises AdapterError if it is too small."""
        costs = {}
        for name in modules:
            layer = transformer.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            none, one = (self.parameters_of_layer(rank, layer.in_features, layer.out_features) for rank in (0, 1))
            costs[name] = Cost(none, one - none, min(layer.in_features, layer.out_features))
        size = self.exported_bytes / 1e6
        budget = int((getattr(self.settings, "budget_mb", None) or 0) / size)
        if budget < least(costs):
            raise AdapterError(
                f"method.budget_mb: {self.settings.budget_mb:g} is too small: rank 1 in {len(costs)} modules takes "
                f"{math.ceil(100 * size * least(costs)) / 100:g} MB; raise it, or choose fewer method.targets or "
                "method.blocks"
            )
        return costs, budget

    def prepare(
        self,
        transformer: SD3Transformer2DModel,
        shapes: Mapping[str, Sequence[int]],
        gradient_norms: Callable[[Sequence[str]], Mapping[str, float]],
    ) -> None:
        if not self.is_automatic:
            return
        modules = self._select(transformer)
        self._has_chosen = True
        if shapes:
            self._ranks = {name: shapes[f"{name}.lora_A"][0] for name in modules if f"{name}.lora_A" in shapes}
            return
        costs, budget = self._within_budget(transformer, modules)
        self._ranks = ranks_by_need(costs, gradient_norms(modules), budget)

    def coverage(self, transformer: nn.Module) -> list[CoverageRow]:
        layers = self._layers(self._select(transformer))
        ranks = {name: layer.rank for name, layer in layers.items()}
        return [*coverage(transformer, ranks, self.parameters_of_layer), *self.text.coverage()]

    def parameters_of_layer(self, rank: int, inputs: int, outputs: int) -> int:
        """Return the number of trained parameters for a linear layer of these sizes."""
        return lora_parameters(rank, inputs, outputs)

    def title(self) -> str:
        kind, rank = self.settings.kind, self.settings.rank
        if self.is_automatic:
            low, high = min(self._ranks.values()), max(self._ranks.values())
            some = f"rank {low} everywhere" if low == high else f"ranks {low} to {high}"
            ranks = some if self._has_chosen else "ranks by gradients"
            text = self.text.title()
            counted = ", without the text encoders" * bool(text)
            return f"{kind}, {ranks} for at most {self.settings.budget_mb:g} MB{counted}{text}"
        others = sorted(set(self.settings.rank_pattern.values()) - {rank})
        some = f" (some {', '.join(map(str, others))})" if others else ""
        ratio = getattr(self.settings, "loraplus_lr_ratio", 1)
        faster = f", B at {ratio:g} x the learning rate" if ratio != 1 else ""
        return f"{kind}, rank {rank}{some}{faster}{self.text.title()}"

    def inject(
        self, transformer: SD3Transformer2DModel, generator: Callable[[str], torch.Generator]
    ) -> dict[str, nn.Parameter]:
        layers = self._layers(self._select(transformer))
        settings = self.settings
        parameters = inject_lora(
            transformer, layers, generator, init=settings.init, dropout=settings.dropout, dora=self.dora
        )
        if self._start:
            for name, factor in starting_factors(self._start, layers).items():
                parameters[name].data = factor.to(parameters[name].device)
        dtype, device = next(transformer.parameters()).dtype, transformer.device
        return {**parameters, **self.text.inject(generator, self._start, dtype, device)}

    def companions(self) -> Sequence[nn.Module]:
        return self.text.companions()

    def rates(self, names: Iterable[str]) -> dict[str, float]:
        ratio = self.settings.loraplus_lr_ratio
        faster = {name: ratio for name in names if ratio != 1 and name.endswith(".lora_B")}
        return faster | self.text.rates(names, self.peak)

    def initialize_from_data(
        self, transformer: SD3Transformer2DModel, observe: Callable[[], object], reduce_mean: Callable[[Tensor], Tensor]
    ) -> None:
        if self.settings.init != "eva":
            return
        started = self._start.factors if self._start else {}
        adapted = {name: layer for name, layer in lora_layers(transformer).items() if name not in started}
        ranks = {name: layer.r[ADAPTER_NAME] for name, layer in adapted.items()}
        with self.disabled(transformer):
            found = input_directions(transformer, ranks, observe)
        for name, directions in found.items():  # the mean gives all ranks bit-identical values
            adapted[name].lora_A[ADAPTER_NAME].weight.data.copy_(reduce_mean(directions.contiguous()))

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        folded = self._folded(weights)
        return {name: adapter_io.in_dtype(name, value, self.export_dtype) for name, value in folded.items()}

    def _folded(self, weights: Weights) -> dict[str, Tensor]:
        own = self.text.of_transformer(weights)
        layers = self._layers([name.removesuffix(".lora_A") for name in own if name.endswith(".lora_A")])
        folded = adapter_io.fold_scale(own, {name: layer.scale for name, layer in layers.items()})
        return {**folded, **self.text.exported(weights)}

    def conditioning(self, embeddings: Embeddings, transformer: SD3Transformer2DModel) -> tuple[Tensor, Tensor]:
        return super().conditioning(self.text.encoded(embeddings), transformer)

    @contextmanager
    def regularised(self, transformer: SD3Transformer2DModel, seed: int) -> Iterator[None]:
        if not self.settings.dropout:
            yield
            return
        dropouts = [module for module in transformer.modules() if isinstance(module, SeededDropout)]
        try:
            for dropout in dropouts:
                dropout.draw(seed)
            yield
        finally:
            for dropout in dropouts:
                dropout.draw(None)

    def as_exported(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None]:
        return self._computing_with(transformer, self.exported(weights))

    def unrounded(self, transformer: SD3Transformer2DModel, weights: Weights) -> AbstractContextManager[None] | None:
        if self.export_dtype is torch.float32:
            return None
        return self._computing_with(transformer, self._folded(weights))

    @contextmanager
    def _computing_with(self, transformer: SD3Transformer2DModel, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        with other_parameters(transformer, tensors), self.text.as_exported(tensors), plain_path(transformer):
            yield

    @contextmanager
    def disabled(self, transformer: SD3Transformer2DModel) -> Iterator[None]:
        with self.without_adapter(transformer), self.text.disabled():
            yield

    @contextmanager
    def without_adapter(self, transformer: SD3Transformer2DModel) -> Iterator[None]:
        """Run the transformer without its adapter, and the text encoders as they are, inside the context."""
        transformer.disable_adapters()
        try:
            with plain_path(transformer):
                yield
        finally:
            transformer.enable_adapters()

    def block_changes(self, transformer: SD3Transformer2DModel, weights: Weights) -> dict[str, float]:
        tensors = self.exported(weights)
        return {**block_norms(self.text.of_transformer(tensors)), **self.text.changes(tensors)}

    def export(self, folder: Path, weights: Weights, contract: Mapping[str, Any]) -> Path:
        return self.write(folder, self.exported(weights), contract)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], contract: Mapping[str, Any]) -> Path:
        """Write the adapter's `exported` tensors into `folder`, and return the file. Raises AdapterError."""
        return adapter_io.write_adapter(folder, tensors, contract, self.export_dtype)

    def sampling_shift(self) -> float | None:
        return None  # an adapter does not change the scheduler

    def infer_arguments(self, run: Path) -> list[str]:
        return ["--lora", str(run)]

    def contract(self) -> dict[str, Any]:
        given = self.settings.model_dump(exclude_defaults=True)
        special = {name: value for name, value in contract_of(self.settings).items() if name in given}
        started = {"start_from": sha256_of(self._start.path)} if self._start else {}
        chosen = {"rank": Counter(self._ranks.values()).most_common(1)[0][0]} if self.is_automatic else {}
        ranks = {"rank": self.settings.rank, "alpha": self.settings.alpha}
        return {"method": self.settings.kind, **ranks, **special, **chosen, **started}

    def identity(self) -> dict[str, Any]:
        start = sha256_of(self._start.path) if self._start else None  # the digest of its content, not its path
        return identity_of(self.settings, {"start_from": {"start_from": start}})

    def savings(self, config: Config) -> Sequence[Saving]:
        fewer = Saving("method", "targets", "attention", "half the trained parameters", planned=False)
        image = Saving("method", "targets", "attention-image")
        modules = {"attention+mlp": (fewer, image), "attention": (image,)}.get(str(self.settings.targets), ())
        frozen = Saving("method", "text_encoders", None, "the text encoders leave the device")
        return (*modules, *[frozen] * bool(self.settings.trained_encoders))

    def _layers(self, modules: Sequence[str]) -> dict[str, Layer]:
        """Return rank and alpha of each module. Raises AdapterError for a pattern that matches no module."""
        settings = self.settings
        ranks = self._ranks
        if settings.rank != "auto":
            ranks = values_by_pattern(modules, settings.rank_pattern, settings.rank, "method.rank_pattern")
        alphas = values_by_pattern(modules, settings.alpha_pattern, settings.alpha, "method.alpha_pattern")
        return {name: Layer(ranks[name], alphas[name], settings.rank_stabilised) for name in modules}

    @functools.cached_property
    def _start(self) -> adapter_io.Adapter | None:
        if self.settings.start_from is None:
            return None
        try:
            return adapter_io.read_adapter(self.settings.start_from)
        except AdapterError as error:
            raise AdapterError(*(f"method.start_from: {problem}" for problem in error.problems)) from error
