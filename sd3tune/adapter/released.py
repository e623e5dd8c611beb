"""The released base that an adapter fits, by its modules and their sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping

from sd3tune.model.base.parts import CONFIGS, VARIANTS
from sd3tune.model.base.weights import read_json

_IN_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)")


def fitting_variants(inputs: Mapping[str, int]) -> list[str]:
    """Return the keys of `VARIANTS` with the modules' widths and all of their blocks and `attn2` layers.

    `inputs` has each module's number of inputs.
    """
    blocks, widths, dual = set(), set(), set()
    for name, width in inputs.items():
        found = _IN_BLOCK.fullmatch(name)
        if found:
            blocks.add(int(found[1]))
            if not found[2].endswith("net.2"):  # the only layers whose input is not the stream
                widths.add(width)
            if found[2].startswith("attn2."):
                dual.add(int(found[1]))
    fitting = []
    for variant in VARIANTS:
        config = read_json(CONFIGS / variant / "transformer" / "config.json")
        width = config["num_attention_heads"] * config["attention_head_dim"]
        has_dual = dual <= set(config.get("dual_attention_layers") or ())
        if widths == {width} and max(blocks) < config["num_layers"] and has_dual:
            fitting.append(variant)
    return fitting
