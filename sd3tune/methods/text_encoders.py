"""LoRA on the CLIP text encoders, beside a method's own parameters."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.adapter.embedding import embedding_beside
from sd3tune.adapter.file import Adapter, fold_scale
from sd3tune.config.sections.text_encoders import EncoderLoraConfig, TrainedEncodersConfig
from sd3tune.errors import AdapterError
from sd3tune.methods.base import Weights
from sd3tune.methods.start_from import check_start, starting_factors, transformer_alone
from sd3tune.methods.trained_text import TrainedText, part_of
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_OF, LABELS
from sd3tune.model.load.components import load_text_encoder, text_encoder_shape
from sd3tune.model.lora.layers import Layer, block_norms, inject_lora, other_parameters
from sd3tune.model.lora.targets import CoverageRow

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_TARGETS = {"attention": _ATTENTION, "attention+mlp": (*_ATTENTION, "mlp.fc1", "mlp.fc2")}


class TrainedEncoders(TrainedText):
    """Adapters on the encoders of `settings`, none by default: `<part>.<module>.lora_A` and `.lora_B`."""

    def __init__(self, settings: Mapping[str, EncoderLoraConfig], base: Base | None) -> None:
        super().__init__(tuple(settings), base)
        self.settings = settings

    def rates(self, names: Iterable[str], peak: float) -> dict[str, float]:
        of = {f"{part_of(encoder)}.": settings.lr / peak for encoder, settings in self.settings.items()}
        return {name: rate for name in names for prefix, rate in of.items() if name.startswith(prefix)}

    def title(self) -> str:
        """Return `; CLIP-L, rank 16` for each trained encoder."""
        return "".join(f"; {LABELS[name]}, rank {settings.rank}" for name, settings in self.settings.items())

    def select(self, start: Adapter | None) -> list[str]:
        begun = None if start is None else embedding_beside(start)
        if begun is not None:
            raise AdapterError(
                f"method.start_from: {begun.path} also has vectors for {begun.token}, which this run does not train; "
                "set method.kind=pivotal, or give a copy of the adapter's file alone"
            )
        for part in () if start is None else start.text_parts:
            assert start is not None
            name = ENCODER_OF[part]
            if name not in self.settings:
                raise AdapterError(_not_trained(start, name))
            check_start(start.of_part(part), self._shapes[name], self._layers(name), f"method.text_encoders.{name}")
        return [f"{part_of(name)}.{module}" for name in self.settings for module in self._layers(name)]

    def coverage(self) -> list[CoverageRow]:
        rows = []
        for name, settings in self.settings.items():
            layers, weights = self._layers(name), self._shapes[name].named_parameters()
            count = len(layers) // len(_TARGETS[settings.targets])
            parameters = settings.rank * sum(
                sum(weight.shape) for key, weight in weights if key.removesuffix(".weight") in layers
            )
            rows.append(CoverageRow(f"{LABELS[name]} {settings.targets}", count, count, parameters))
        return rows

    def inject(
        self,
        generator: Callable[[str], torch.Generator],
        start: Adapter | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> dict[str, nn.Parameter]:
        parameters: dict[str, nn.Parameter] = {}
        for name in self.settings:
            part, layers = part_of(name), self._layers(name)
            encoder = self.live[name] = load_text_encoder(self.base, name, dtype, device)
            model: Any = encoder.model
            added = inject_lora(model, layers, _seeded(generator, part))
            started = {} if start is None else starting_factors(start.of_part(part), layers)
            for module, factor in started.items():
                added[module].data = factor.to(added[module].device)
            parameters |= {f"{part}.{module}": parameter for module, parameter in added.items()}
        return parameters

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        layers = {
            f"{part_of(name)}.{module}": one for name in self.settings for module, one in self._layers(name).items()
        }
        scales = {module: layer.scale for module, layer in layers.items()}
        return fold_scale(_of_parts(weights, self.prefixes), scales)

    @contextmanager
    def as_exported(self, tensors: Weights) -> Iterator[None]:
        with ExitStack() as stack:
            for name, encoder in self.live.items():
                prefix = f"{part_of(name)}."
                own = {key.removeprefix(prefix): tensor for key, tensor in _of_parts(tensors, [prefix]).items()}
                stack.enter_context(other_parameters(encoder.model, own))
            stack.enter_context(self.without_gradients())
            yield

    def changes(self, tensors: Weights) -> dict[str, float]:
        """Return the norm of the weight update of each encoder, from `exported` tensors."""
        norms = {name: block_norms(_of_parts(tensors, [f"{part_of(name)}."])).values() for name in self.settings}
        return {LABELS[name]: sum(norm**2 for norm in of) ** 0.5 for name, of in norms.items()}

    @functools.cached_property
    def _shapes(self) -> dict[str, nn.Module]:
        """The trained encoders without weights."""
        return {name: text_encoder_shape(self.base, name, torch.float32) for name in self.settings}

    def _layers(self, name: str) -> dict[str, Layer]:
        settings = self.settings[name]
        layer = Layer(settings.rank, settings.alpha)
        return {
            module: layer
            for module, _ in self._shapes[name].named_modules()
            if module.endswith(tuple(f".{target}" for target in _TARGETS[settings.targets]))
        }


def _seeded(generator: Callable[[str], torch.Generator], part: str) -> Callable[[str], torch.Generator]:
    return lambda module: generator(f"{part}.{module}")


def _not_trained(start: Adapter, name: str) -> str:
    also = f"method.start_from: {start.path} also adapts {LABELS[name]}, which "
    without = transformer_alone(start)
    if name not in TrainedEncodersConfig.model_fields:
        return f"{also}sd3tune does not train; {without}"
    return f"{also}this run does not train; set method.text_encoders.{name}, or leave it out: {without}"


def _of_parts(tensors: Weights, prefixes: Sequence[str]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(tuple(prefixes))}
