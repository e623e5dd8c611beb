"""`sd3tune lora inspect`: describe an adapter file, without its base."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sd3tune.adapter.contents import Contents
from sd3tune.adapter.embedding import Embedding, embedding_beside, is_embedding, read_embedding
from sd3tune.adapter.file import Adapter, AdapterFile, as_adapter, read_file, too_large
from sd3tune.adapter.lycoris import product, rank_of
from sd3tune.adapter.modelspec import THUMBNAIL_KEY
from sd3tune.adapter.rearrange import first_of, interpret, shown, text_part
from sd3tune.adapter.released import fitting_variants
from sd3tune.adapter.text_layouts import by_encoder
from sd3tune.errors import AdapterError
from sd3tune.model.base.parts import LABELS
from sd3tune.model.lora.layers import block_norms, norms_by_block

_PRINTED_ELSEWHERE = ("contract_version", "base", "base_kind", "base_revision", "base_fingerprint", "trigger", "name")
_KOHYA = {"ss_output_name": "name", "ss_base_model_version": "base", "modelspec.trigger_phrase": "trigger"}
_SHOWN = {"modelspec.title": "title", "modelspec.architecture": "arch", "modelspec.usage_hint": "hint"}


def inspect_lora(location: Path) -> list[str]:
    """Return lines that describe a valid or invalid file, or the embedding of a token.

    Raises AdapterError if it is neither an adapter for SD3 nor an embedding.
    """
    if is_embedding(location):
        return _embedding_alone(read_embedding(location))
    file = read_file(location)
    contents = interpret(file.tensors)
    if not contents.sizes:
        raise AdapterError(f"{file.path}: not a LoRA for SD3's transformer: {_why_empty(contents)}")
    adapter = as_adapter(file, contents)
    return [
        f"{file.path}: a {adapter.kind} in {adapter.layout}'{'s' * (adapter.layout[-1] != 's')} layout",
        *_base(adapter),
        *_sizes(adapter, contents),
        *_modules(adapter),
        *_text(adapter),
        *(_embedding(one) if (one := embedding_beside(adapter)) is not None else ()),
        *_contract(adapter),
        *_norms(adapter),
        *(f"warning: {line}" for line in _warnings(file, contents, adapter)),
    ]


def _why_empty(contents: Contents) -> str:
    for module, fault in contents.broken.items():
        return f"{module}: {fault}"
    if contents.text and not contents.unknown:
        return f"only {text_part(contents.text)}"
    for key, what in contents.unknown.items():
        return f"{shown(key)} is {what}" if what else f"no known layout has a key like {shown(key)}"
    return "the file holds no tensors"


def _base(adapter: Adapter) -> Iterator[str]:
    contract = adapter.contract
    variants = (
        " or ".join(fitting_variants({module: inputs for module, (_, inputs) in adapter.sizes.items()}))
        or "none of the released bases"
    )
    if contract.get("base") is None:
        yield f"base      not stated; its sizes fit {variants}"
    else:
        revision = f", revision {contract['base_revision']}" if contract.get("base_revision") else ""
        fingerprint = f", weights {contract['base_fingerprint'][:12]}" if contract.get("base_fingerprint") else ""
        kind = contract.get("base_kind", "kind unknown")
        yield f"base      {shown(contract['base'])} ({kind}{revision}{fingerprint})"


def _sizes(adapter: Adapter, contents: Contents) -> Iterator[str]:
    tensors = [tensor for parts in contents.lycoris.values() for tensor in parts.values()]
    tensors += [factor for pair in adapter.factors.values() for factor in pair]
    parameters = sum(tensor.numel() for tensor in (*tensors, *adapter.magnitudes.values()))
    # Magnitudes are read as fp32, whatever the file holds.
    dtypes = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
    yield f"modules   {len(adapter.sizes)}, {parameters:,} parameters, {dtypes}"
    if adapter.lycoris:
        of_parts = [rank_of(parts) for parts in adapter.lycoris.values()]
        yield f"rank      {_counted('whole matrices' if rank is None else rank for rank in of_parts)}"
        return
    yield f"rank      {_counted(len(down) for down, _ in adapter.factors.values())}"
    ranks = {module: len(down) for module, (down, _) in adapter.factors.items()}
    scales = {module: adapter.alphas[module] / rank for module, rank in ranks.items()}
    stated = {module: scale * (ranks[module] ** 0.5 if adapter.rslora else ranks[module])
              for module, scale in scales.items()}  # fmt: skip
    remarks = [note for note in adapter.notes if note.startswith("no alpha")]
    remarks += ["rank-stabilised: scale = alpha / sqrt(rank)"] if adapter.rslora else []
    yield f"alpha     {_counted(f'{alpha:g}' for alpha in stated.values())}" + "".join(f" ({one})" for one in remarks)
    yield f"scale     {_counted(f'{scale:.4g}' for scale in scales.values())}"


def _modules(adapter: Adapter) -> Iterator[str]:
    """Yield a line per kind of adapted module with its count."""
    kinds = Counter(re.sub(r"^transformer_blocks\.\d+\.", "", module) for module in adapter.sizes)
    for number, (kind, count) in enumerate(kinds.items()):
        yield f"{'trained' if number == 0 else '':<10}{kind} in {count} place{'s' * (count != 1)}"


def _text(adapter: Adapter) -> Iterator[str]:
    """Yield a line with the modules and ranks of the text encoders, if it adapts any."""
    if adapter.text_factors:
        ranks = _counted(len(down) for down, _ in adapter.text_factors.values())
        yield f"text      {by_encoder(adapter.text_factors)} modules, rank {ranks}"


def _embedding_alone(embedding: Embedding) -> list[str]:
    described = Adapter(embedding.path, {}, {}, dict(embedding.contract))
    base = _base(described) if embedding.contract else ["base      not stated: another tool wrote it"]
    return [f"{embedding.path}: the embedding of a token", *base, *_embedding(embedding), *_contract(described)]


def _embedding(embedding: Embedding) -> Iterator[str]:
    """Yield lines with the token, its vectors for each encoder with their norms, and T5's words."""
    yield f"token     {shown(embedding.token)}, for which T5 reads {shown(embedding.t5_caption)}"
    for name, rows in embedding.rows.items():
        norms = ", ".join(f"{norm:.4g}" for norm in rows.norm(dim=1).tolist())
        count = f"{len(rows)} vector{'s' * (len(rows) != 1)} of {rows.shape[1]} numbers"
        yield f"{LABELS[name]:<10}{count}, norm{'s' * (len(rows) != 1)} {norms}"


def _contract(adapter: Adapter) -> Iterator[str]:
    contract: Mapping[str, Any] = adapter.contract
    foreign = {name: adapter.metadata[key] for key, name in _KOHYA.items() if adapter.metadata.get(key)}
    trigger = contract.get("trigger") or foreign.pop("trigger", None)
    for key, name in _SHOWN.items():
        if adapter.metadata.get(key):
            yield f"{name:<10}{shown(adapter.metadata[key])}"
    if adapter.metadata.get(THUMBNAIL_KEY):
        yield f"thumbnail {len(adapter.metadata[THUMBNAIL_KEY]) / 1000:.1f} kB in the header"
    yield f"trigger   {shown(str(trigger)) if trigger else 'none stated'}"
    for name, value in foreign.items() if not contract else ():
        yield f"{name:<10}{shown(value)}, according to the tool that wrote it"
    settings = {key: value for key, value in contract.items() if key not in _PRINTED_ELSEWHERE and value is not None}
    if not contract:
        yield "settings  none: another tool wrote it, and `infer` needs --base"
    for number, (key, value) in enumerate(settings.items()):
        yield f"{'settings' if number == 0 else '':<10}{shown(key)}: {shown(str(value))}"


def _norms(adapter: Adapter) -> Iterator[str]:
    folded = {
        f"{module}.lora_{letter}": factor
        for module, pair in adapter.folded().items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    norms = block_norms(folded) or norms_by_block((name, product(of)) for name, of in adapter.lycoris.items())
    for number, (block, norm) in enumerate(norms.items()):
        yield f"{('|BA|' if folded else '|update|') if number == 0 else '':<10}{block}: {norm:.4g}"


def _warnings(file: AdapterFile, contents: Contents, adapter: Adapter) -> Iterator[str]:
    for what in dict.fromkeys(contents.unknown.values()):
        keys = [key for key, reason in contents.unknown.items() if reason == what]
        yield f"{len(keys)} unknown key{'s' * (len(keys) != 1)}: {first_of(keys)}" + f", {what}" * bool(what)
    if contents.unread:
        yield f"{text_part(contents.unread)}; the other commands refuse the file without --transformer-only"
    for module, fault in contents.broken.items():
        yield f"{module}: {fault}"
    if file.bad:
        yield f"{len(file.bad)} tensors are NaN or infinite: {first_of(file.bad)}"
    if adapter.too_large:
        yield too_large(adapter)
    zero = [module for module, (_, up) in adapter.factors.items() if not up.float().any()]
    if zero:
        yield f"B is zero, so these have no effect: {first_of(zero)} (of {len(adapter.factors)} modules)"
    wide = [module for module, (down, up) in adapter.factors.items() if len(down) > min(down.shape[1], len(up))]
    if wide:
        yield f"the rank exceeds the layer's dimensions: {first_of(wide)}; `lora resize` reduces it without loss"
    muted = [module for module, alpha in adapter.alphas.items() if alpha == 0]
    if muted:
        yield f"alpha is zero, so these have no effect: {first_of(muted)}"
    if contents.unknown or contents.broken or file.bad or adapter.too_large:
        yield "`infer` and the other commands refuse this file"


def _counted(values: Any) -> str:
    """Return `8`, or `8 (40 modules), 16 (4 modules)`, most frequent first."""
    counts = Counter(values).most_common()
    if len(counts) == 1:
        return str(counts[0][0])
    shown = ", ".join(f"{value} ({count} modules)" for value, count in counts[:6])
    return shown + (f" and {len(counts) - 6} other values" if len(counts) > 6 else "")
