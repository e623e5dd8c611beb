"""The tables of docs/scale.md, computed from stated constants: `python -m benchmarks.scale` prints them.

Nothing is measured here. A test compares the constants with the code that they describe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SIDE, LATENT_CHANNELS, LATENT_SCALE = 1024, 16, 8
CLIP_TOKENS, T5_TOKENS = 77, 256
WIDTHS = {"CLIP-L": (768, 768), "CLIP-G": (1280, 1280), "T5": (4096, 0)}
"""Values per token, and of the pooled vector."""
ENCODING_TFLOP = {"VAE": 4.883, "CLIP-L": 0.0133, "CLIP-G": 0.0979, "T5": 2.397}
"""Of one image at 1024 px and one caption, by torch's counter on the meta device."""
PARAMETERS = {"SD3.5 medium": 2.243e9, "SD3.5 large": 8.057e9}
ADAPTER = {"SD3.5 medium": 11.89e6, "SD3.5 large": 23.50e6}
"""Parameters of a LoRA of rank 16 on all attention projections."""
STEP_TFLOP = {
    "SD3.5 medium": {"adapter": 40.2, "whole": 47.1},
    "SD3.5 large": {"adapter": 104.5, "whole": 128.1},
}
"""Of one image at 1024 px with 256 T5 tokens and block checkpointing, by `sd3tune plan`."""
CARDS = {"4090": 165, "A100": 312, "H100": 989}
"""TFLOP/s of dense 16-bit products, as `sd3tune plan` has them."""
UTILISATION = 0.4
"""The share of it that is reached: the assumption of `sd3tune plan`."""
HOST_BYTES = {"record": 511, "example": 908, "entry of the store": 391, "order of an epoch": 40}
"""Python objects of one image and caption, by tracemalloc on Python 3.11."""
ENTRIES = 4
"""Entries of the store for an image with its own caption: latents and three encoders."""
LINKS = {"10 Gb/s": 1.25, "100 Gb/s": 12.5, "400 Gb/s": 50.0}
"""GB/s of each GPU's own link."""
GPUS = 16
SIZES = (10**6, 10**9)


def store_bytes() -> dict[str, int]:
    """Return the bytes of one image and one caption in the store."""
    positions = (SIDE // LATENT_SCALE) ** 2
    moments = 2 * LATENT_CHANNELS * positions  # mean and standard deviation
    tokens = {"CLIP-L": CLIP_TOKENS, "CLIP-G": CLIP_TOKENS, "T5": T5_TOKENS}
    texts = {name: 2 * (tokens[name] * width + pooled) for name, (width, pooled) in WIDTHS.items()}
    short = {"T5 at 77 tokens": 2 * CLIP_TOKENS * WIDTHS["T5"][0]}
    return {"moments in fp32, as stored": 4 * moments, "moments in bf16": 2 * moments, **texts, **short}


def network_bytes(parameters: float, adapter: float) -> dict[str, float]:
    """Return the bytes that each GPU sends in a step: ring collectives, which send (n - 1) / n of a tensor's bytes."""
    share = (GPUS - 1) / GPUS
    gathered = 2 * 2 * parameters  # weights in bf16, for the forward and for the backward pass
    return {
        "adapter, DDP": share * 2 * 4 * adapter,
        "adapter, FSDP or ZeRO-3 base": share * (gathered + 2 * 4 * adapter),
        "whole, DDP": share * 2 * 4 * parameters,
        "whole, ZeRO-2": share * (4 + 2) * parameters,
        "whole, FSDP or ZeRO-3": share * (gathered + 4 * parameters),
    }


def store_table() -> str:
    rows = [[name, f"{nbytes / 1e6:.2f} MB", *(_size(nbytes * n) for n in SIZES)] for name, nbytes in _kept().items()]
    return _table(["one image at 1024 px, one caption", "each", "10^6", "10^9"], rows)


def _kept() -> dict[str, int]:
    parts = store_bytes()
    today = parts["moments in fp32, as stored"] + sum(parts[name] for name in WIDTHS)
    return {**parts, "all, with fp32 moments": today, "all, with bf16 moments": today - parts["moments in bf16"]}


def encoding_table() -> str:
    total = sum(ENCODING_TFLOP.values())
    parts = {**ENCODING_TFLOP, "all": total}
    rows = []
    for name, tflop in parts.items():
        hours = [tflop * SIZES[0] / (card * UTILISATION) / 3600 for card in CARDS.values()]
        years = [f"{one * SIZES[1] / SIZES[0] / 8766:.2g}" for one in hours]
        rows.append(
            [name, f"{tflop:.3g}", *(f"{one:.2g} h, {long} years" for one, long in zip(hours, years, strict=True))]
        )
    return _table(["encoder", "TFLOP each", *(f"{card}: 10^6, 10^9" for card in CARDS)], rows)


def host_table() -> str:
    each = {name: nbytes * (ENTRIES if name == "entry of the store" else 1) for name, nbytes in HOST_BYTES.items()}
    each |= {"all of these": sum(each.values())}
    rows = [[name, f"{nbytes} bytes", *(_size(nbytes * n) for n in SIZES)] for name, nbytes in each.items()]
    return _table(["in memory, in each process", "each image", "10^6", "10^9"], rows)


def shuffle_table() -> str:
    """A sample leaves a buffer of B after a geometric number of draws: mean and standard deviation are about B."""
    rows = []
    for n in SIZES:
        for buffer in (10**3, 10**4, 10**5):
            shards = buffer // 10**3 + 1
            moved = 100 * buffer / n
            rows.append([f"10^{len(str(n)) - 1}", f"{buffer:,}", f"{moved:.3g} %", str(shards), _size(buffer * 0.5e6)])
    return _table(["images", "buffer", "moved by", "shards mixed", "buffer of 0.5 MB files"], rows)


def network_table() -> str:
    rows = []
    for base, parameters in PARAMETERS.items():
        for name, nbytes in network_bytes(parameters, ADAPTER[base]).items():
            image = STEP_TFLOP[base][name.partition(",")[0]] / (CARDS["H100"] * UTILISATION)
            seconds = [nbytes / 1e9 / rate for rate in LINKS.values()]
            rows.append(
                [f"{base}: {name}", _size(nbytes), *(f"{one:.2g} s" for one in seconds), f"{seconds[1] / image:.2g}"]
            )
    return _table(["", "each GPU sends", *LINKS, "images that hide 100 Gb/s"], rows)


def _size(nbytes: float) -> str:
    for unit, factor in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes / 1e3:.3g} kB"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


TABLES = (store_table, encoding_table, host_table, shuffle_table, network_table)

if __name__ == "__main__":
    print(*(table() for table in TABLES), sep="\n\n")
