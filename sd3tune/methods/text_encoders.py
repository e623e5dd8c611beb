"""Trained text encoders: LoRA on the CLIPs, beside a method's own parameters.

A trained encoder stays in memory and encodes its captions in every step. Each distinct caption of a micro-batch is
encoded once, by itself, so that with zero adapters its embedding equals the store's to the bit.
"""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sd3tune.adapter.file import Adapter, fold_scale
from sd3tune.config.sections.text_encoders import EncoderLoraConfig, TrainedEncodersConfig
from sd3tune.errors import AdapterError
from sd3tune.methods.base import Embeddings, Weights
from sd3tune.methods.start_from import check_start, starting_factors
from sd3tune.model.base.base import Base
from sd3tune.model.base.parts import ENCODER_OF, ENCODER_PARTS, LABELS
from sd3tune.model.load.components import load_text_encoder, text_encoder_shape
from sd3tune.model.load.text import TOKENS, TextEncoder
from sd3tune.model.lora.layers import Layer, block_norms, inject_lora, other_parameters
from sd3tune.model.lora.targets import CoverageRow

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
_TARGETS = {"attention": _ATTENTION, "attention+mlp": (*_ATTENTION, "mlp.fc1", "mlp.fc2")}


class TrainedEncoders:
    """The trained encoders of a method, none by default. Parameters are named `<part>.<module>.lora_A` and `.lora_B`.

    `<part>` is the encoder's folder in diffusers' layout: `text_encoder` or `text_encoder_2`.
    """

    def __init__(self, settings: Mapping[str, EncoderLoraConfig], base: Base | None) -> None:
        self.settings, self.base = settings, base
        self.live: dict[str, TextEncoder] = {}
        """The encoders in memory, by name; empty before `inject`."""
        self._reads_store = False
        self._exported = False

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.settings)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Prefixes of parameter names, for each encoder."""
        return tuple(f"{_part(name)}." for name in self.settings)

    def rates(self, names: Iterable[str], peak: float) -> dict[str, float]:
        """Return the learning rates of the encoders' parameters among `names`, as multiples of `peak`."""
        of = {f"{_part(encoder)}.": settings.lr / peak for encoder, settings in self.settings.items()}
        return {name: rate for name in names for prefix, rate in of.items() if name.startswith(prefix)}

    def of_transformer(self, tensors: Weights) -> dict[str, Tensor]:
        """Return the tensors that belong to no encoder."""
        return {name: tensor for name, tensor in tensors.items() if not name.startswith(self.prefixes)}

    def title(self) -> str:
        """Return `; CLIP-L, rank 16` for each trained encoder."""
        return "".join(f"; {LABELS[name]}, rank {settings.rank}" for name, settings in self.settings.items())

    def select(self, start: Adapter | None) -> list[str]:
        """Return the names of the trained modules. Raises AdapterError if `start` cannot be continued."""
        for part in () if start is None else start.text_parts:
            assert start is not None
            name = ENCODER_OF[part]
            if name not in self.settings:
                raise AdapterError(_not_trained(start, name))
            check_start(start.of_part(part), self._shapes[name], self._layers(name), f"method.text_encoders.{name}")
        return [f"{_part(name)}.{module}" for name in self.settings for module in self._layers(name)]

    def coverage(self) -> list[CoverageRow]:
        """Return a row for each trained encoder."""
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
        """Load the encoders, add their adapters, and return the parameters, fp32."""
        parameters: dict[str, nn.Parameter] = {}
        for name in self.settings:
            part, layers = _part(name), self._layers(name)
            encoder = self.live[name] = load_text_encoder(self._base, name, dtype, device)
            model: Any = encoder.model
            added = inject_lora(model, layers, _seeded(generator, part))
            started = {} if start is None else starting_factors(start.of_part(part), layers)
            for module, factor in started.items():
                added[module].data = factor.to(added[module].device)
            parameters |= {f"{part}.{module}": parameter for module, parameter in added.items()}
        return parameters

    def encoded(self, embeddings: Embeddings) -> Embeddings:
        """Return the embeddings with the trained encoders' own, from the tokens of their captions."""
        if self._reads_store:
            return embeddings
        with torch.no_grad() if self._exported else nullcontext():
            return {
                **embeddings,
                **{name: encode_entries(encoder, embeddings[name]) for name, encoder in self.live.items()},
            }

    def exported(self, weights: Weights) -> dict[str, Tensor]:
        """Return the trained encoders' part of `weights`, with the scales folded in."""
        layers = {
            f"{_part(name)}.{module}": one for name in self.settings for module, one in self._layers(name).items()
        }
        scales = {module: layer.scale for module, layer in layers.items()}
        return fold_scale(_of_parts(weights, self.prefixes), scales)

    @contextmanager
    def as_exported(self, tensors: Weights) -> Iterator[None]:
        """Encode with the `exported` tensors, without gradients, inside the context."""
        with ExitStack() as stack:
            for name, encoder in self.live.items():
                prefix = f"{_part(name)}."
                own = {key.removeprefix(prefix): tensor for key, tensor in _of_parts(tensors, [prefix]).items()}
                stack.enter_context(other_parameters(encoder.model, own))
            before, self._exported = self._exported, True
            try:
                yield
            finally:
                self._exported = before

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Use the store's embeddings, which are the base's, inside the context."""
        before, self._reads_store = self._reads_store, True
        try:
            yield
        finally:
            self._reads_store = before

    def changes(self, tensors: Weights) -> dict[str, float]:
        """Return the norm of the weight update of each encoder, from `exported` tensors."""
        return {
            LABELS[name]: sum(norm**2 for norm in block_norms(_of_parts(tensors, [f"{_part(name)}."])).values()) ** 0.5
            for name in self.settings
        }

    @property
    def _base(self) -> Base:
        assert self.base is not None
        return self.base

    @functools.cached_property
    def _shapes(self) -> dict[str, nn.Module]:
        """The trained encoders without weights."""
        return {name: text_encoder_shape(self._base, name, torch.float32) for name in self.settings}

    def _layers(self, name: str) -> dict[str, Layer]:
        settings = self.settings[name]
        layer = Layer(settings.rank, settings.alpha)
        return {
            module: layer
            for module, _ in self._shapes[name].named_modules()
            if module.endswith(tuple(f".{target}" for target in _TARGETS[settings.targets]))
        }


def _part(name: str) -> str:
    return ENCODER_PARTS[name][1]


def _seeded(generator: Callable[[str], torch.Generator], part: str) -> Callable[[str], torch.Generator]:
    return lambda module: generator(f"{part}.{module}")


def _not_trained(start: Adapter, name: str) -> str:
    also = f"method.start_from: {start.path} also adapts {LABELS[name]}, which "
    without = (
        f"`sd3tune lora convert {shlex.quote(str(start.path))} --transformer-only --to diffusers --out "
        "NEW.safetensors` writes a file without text encoders"
    )
    if name not in TrainedEncodersConfig.model_fields:
        return f"{also}sd3tune does not train; {without}"
    return f"{also}this run does not train; set method.text_encoders.{name}, or leave it out: {without}"


def _of_parts(tensors: Weights, prefixes: Sequence[str]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key.startswith(tuple(prefixes))}


def encode_entries(encoder: TextEncoder, entry: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entry [B, ...] computed by the encoder. A row of zeros as tokens is a dropped caption: it is zeros."""
    tokens, names = entry[TOKENS], [name for name in entry if name != TOKENS]
    texts = [tuple(row) for row in tokens.tolist()]
    rows: dict[tuple[int, ...], Mapping[str, Tensor]] = {}
    for number, text in enumerate(texts):
        if text not in rows:
            here = slice(number, number + 1)
            if any(text):
                rows[text] = encoder.compute(tokens[here])
            else:
                rows[text] = {name: torch.zeros_like(entry[name][here]) for name in names}
    return {name: torch.cat([rows[text][name] for text in texts]) for name in names}
