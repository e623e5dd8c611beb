"""PEFT's configuration of a LoRA: each module's alpha, from a file's metadata or from `adapter_config.json`.

PEFT's `save_pretrained` writes a folder of two files and keeps alpha, rsLoRA and patterns in the configuration alone;
diffusers writes the same keys into the metadata of its one file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from sd3tune.adapter.contents import Pair
from sd3tune.adapter.metadata import PEFT_KEY, PREFIX, parse_object
from sd3tune.adapter.text_layouts import is_text, of_part, text_parts
from sd3tune.errors import AdapterError
from sd3tune.files.json import NotJson, dotted, read_object
from sd3tune.model.base.contract import WAY_OUT, Part, check_part

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
"""File names in a folder written by PEFT."""

_APPLIED = ("r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_OF_TRAINING = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout"),
    *("megatron_config", "megatron_core", "runtime_config", "qalora_group_size", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("rank_dropout", "rank_dropout_scale", "module_dropout", "init_weights"),  # LoHa's and LoKr's
    *("decompose_both", "decompose_factor", "use_effective_conv2d"),
)
"""Keys that do not change the result of a saved LoRA; its modules follow from its tensors."""
_PLAIN: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA", "LOHA", "LOKR"),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),  # other values change the base's weights
}
"""Key -> values of a plain LoRA; an empty, false or missing value is always allowed."""


_LITERAL = re.compile(r"(\^?)(\.\*)?((?:\\?\.|[\w-])+)\$?", re.ASCII)
_MOST_PATTERNS, _LONGEST_PATTERN = 1024, 256  # more than SD3 has modules, and longer than any of their names
_Number = Annotated[float, Field(allow_inf_nan=False)]


class _Peft(Part):
    r: int | None = Field(None, ge=1)
    lora_alpha: _Number | None = None
    rank_pattern: dict[str, int] | None = Field(None, max_length=_MOST_PATTERNS)
    alpha_pattern: dict[str, _Number] | None = Field(None, max_length=_MOST_PATTERNS)
    use_rslora: bool | None = None
    use_dora: bool | None = None
    peft_type: str | None = None
    alpha: _Number | None = None


@dataclass(frozen=True)
class PeftConfig:
    """PEFT's settings of a saved LoRA; all None for a file without settings."""

    stated: _Peft
    file: Path | None = None
    """The `adapter_config.json` that was read; None for metadata."""
    has_expressions: bool = False
    """True if it names modules by regular expressions, which PEFT would run. sd3tune never runs them."""

    def alphas(self, ranks: Mapping[str, int]) -> dict[str, float]:
        """Return module -> alpha for the modules of `ranks` that have one, such that alpha / rank is PEFT's scale.

        rsLoRA scales by alpha / sqrt(r), so its alpha is multiplied by sqrt(r). Raises AdapterError if the rank in
        `adapter_config.json` differs from the tensors'.
        """
        rank_of, alpha_of = _Patterns(self.stated.rank_pattern), _Patterns(self.stated.alpha_pattern)
        alphas = {}
        for module, rank in ranks.items():
            expected = rank_of.first_fit(module, self.stated.r)
            if self.file is not None and expected not in (None, rank):
                raise AdapterError(
                    f"{self.file}: states rank {expected} for {module}, whose tensors have rank {rank}; "
                    "configuration and weights do not belong together"
                )
            alpha = alpha_of.first_fit(module, self.stated.lora_alpha)
            if alpha is not None:
                alphas[module] = alpha * (rank**0.5 if self.stated.use_rslora else 1)
        return alphas

    def scale(self, module: str, rank: int | None) -> float:
        """Return alpha / rank of a module of LoHa or LoKr, as PEFT scales it; 1 if none is stated.

        `rank` is that of its tensors. PEFT also scales a LoKr of whole matrices, by the rank that was asked for.
        """
        alpha = _Patterns(self.stated.alpha_pattern).first_fit(module, self.stated.alpha)
        asked = rank or _Patterns(self.stated.rank_pattern).first_fit(module, self.stated.r)
        return 1.0 if alpha is None or asked is None else float(alpha) / asked


class _Patterns:
    """PEFT's `rank_pattern` or `alpha_pattern`; the first matching pattern gives the value of a module.

    A pattern is an ending of dotted names; after `^` it is the whole name, after `.*` any ending. PEFT accepts any
    regular expression. A stranger's could run for hours, so other patterns are refused when the configuration is read.
    """

    def __init__(self, values: Mapping[str, Any] | None) -> None:
        self._parsed = []
        for pattern, value in (values or {}).items():
            found = _LITERAL.fullmatch(pattern)
            assert found is not None
            start, anything, literal = found.groups()
            # A dot matches any character, as in PEFT, so each part of the expression matches one character.
            length = len(literal.replace("\\", ""))
            self._parsed.append((start, anything, re.compile(literal), length, value))

    def first_fit(self, module: str, default: Any) -> Any:
        for start, anything, literal, length, value in self._parsed:
            before = module[:-length]
            at_a_name = not before or (not start and before.endswith("."))
            if (anything or at_a_name) and literal.fullmatch(module[-length:]):
                return value
        return default


def read_peft(path: Path, metadata: Mapping[str, str], layout: str, part: str = "transformer") -> PeftConfig:
    """Return PEFT's configuration of the file `path`: from its metadata, else from `adapter_config.json` beside it.

    `part` is the adapted model, by its folder in diffusers' layout. The second file is read only for the transformer,
    and only for a file with PEFT's name or layout. Raises AdapterError, with the key, for anything but a plain LoRA.
    """
    where = f"{path}: its metadata {PEFT_KEY!r}"
    stored = parse_object(where, metadata.get(PEFT_KEY, "{}"))
    # A pipeline's metadata has a prefix per model; the metadata of a single transformer has none.
    prefix, is_transformer = f"{part}.", part == "transformer"
    found = {key.removeprefix(prefix): value for key, value in stored.items()
             if key.startswith(prefix) or (is_transformer and "." not in key)}  # fmt: skip
    if not is_transformer:
        return PeftConfig(_checked(where, found), has_expressions=_has_expressions(found))
    config = path.with_name(CONFIG_FILE)
    if found or not (path.name == WEIGHTS_FILE or layout == "PEFT") or not config.is_file():
        return PeftConfig(_checked(where, found), has_expressions=_has_expressions(found))
    try:
        stated = read_object(config)
    except NotJson as error:
        raise AdapterError(f"{config} is not valid JSON: {error}{WAY_OUT}") from None
    except OSError as error:
        raise AdapterError(f"{config}: cannot be read: {error.strerror}") from error
    return PeftConfig(_checked(f"{config}", stated), config)


def peft_metadata(ranks: Mapping[str, int], dora: bool = False) -> str:
    """Return PEFT's configuration of layers with these ranks and alpha = rank, for each model by its prefix.

    With `dora`, the transformer's layers are DoRA.
    """
    parts = {PREFIX: {module: rank for module, rank in ranks.items() if not is_text(module)}}
    parts |= {f"{part}.": of_part(ranks, part) for part in text_parts(ranks)}
    every = {prefix + key: value for prefix, own in parts.items() for key, value in _peft_config(own).items()}
    if dora:
        every[f"{PREFIX}use_dora"] = True
    return json.dumps(every, sort_keys=True)


def _peft_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # Only fields that every PEFT version has: an unknown field stops another version from loading the file.
    peft: dict[str, Any] = {
        "r": rank, "lora_alpha": rank, "target_modules": list(ranks), "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    special = {f"^{module}": own for module, own in ranks.items() if own != rank}
    if special:
        peft |= {"rank_pattern": special, "alpha_pattern": special}
    return peft


def peft_arguments(factors: Mapping[str, Pair], alphas: Mapping[str, float]) -> dict[str, Any]:
    """Return the arguments of PEFT's `LoraConfig` for these modules."""
    ranks, first = {module: len(down) for module, (down, _) in factors.items()}, next(iter(factors))
    return {
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "target_modules": list(ranks),
        "rank_pattern": {f"^{module}": rank for module, rank in ranks.items() if rank != ranks[first]},
        "alpha_pattern": {f"^{module}": alphas[module] for module in ranks if alphas[module] != alphas[first]},
    }


def _has_expressions(values: Mapping[str, Any]) -> bool:
    """Return True if PEFT would run a regular expression: a single text instead of a list, or `layers_pattern`."""
    names = (values.get(key) for key in ("target_modules", "exclude_modules"))
    return any(isinstance(value, str) for value in names) or bool(values.get("layers_pattern"))


def _checked(where: str, values: Mapping[str, Any]) -> _Peft:
    odd = [key for key, value in values.items() if value and not _is_plain(key, value)]
    if odd:
        raise AdapterError(
            *(
                f"{where}: {dotted((key,))}: {json.dumps(values[key])[:60]} is not supported, as sd3tune reads plain "
                "LoRA only; train or export the adapter without it"
                for key in odd
            )
        )
    check_part(where, values, _Peft, AdapterError)
    stated = _Peft.model_validate(values)
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(stated, key) or ():
            if len(pattern) > _LONGEST_PATTERN or not _LITERAL.fullmatch(pattern):
                raise AdapterError(
                    f"{where}: {key}: {pattern[:_LONGEST_PATTERN]!r} is a regular expression, and only names of "
                    "modules and their endings are read, such as attn.to_q or ^context_embedder; name each module"
                )
    return stated


def _is_plain(key: str, value: object) -> bool:
    return key in _APPLIED or key in _OF_TRAINING or value in _PLAIN.get(key, ())
