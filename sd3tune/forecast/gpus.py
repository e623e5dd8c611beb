"""GPUs by name, with the memory and peak throughput that their makers publish."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from sd3tune.errors import ConfigError


@dataclass(frozen=True)
class GpuSpec:
    """A GPU's published specification."""

    name: str
    memory: float
    """Advertised GB. Some drivers report 7 % more bytes, which is left as a margin."""
    tflops: float
    """TFLOP/s of dense 16-bit matrix products with fp32 accumulation, from the data sheet, without sparsity."""
    bf16: bool = True


_AMPERE_AND_LATER = """
b200           180 2250   h200           141  989   gh200           96  989   h100            80  989
a100            80  312   a40             48  150   a30             24  165   a10             24  125
a10g            24   70   l40s            48  362   l40             48  181   l4              24  121
6000 ada        48  364   5000 ada        32  261   4500 ada        24  159   4000 ada        20  107
a6000           48  155   a5000           24  111   a4500           20   95   a4000           16   77
a2000           12   32   5090            32  209   5080            16  113   5070 ti         16   88
5070            12   62   5060 ti         16   47   5060             8   38   5050             8   26
4090            24  165   4080 super      16  104   4080            16   97   4070 ti super   16   88
4070 ti         12   80   4070 super      12   71   4070            12   58   4060 ti          8   44
4060             8   30   3090 ti         24   80   3090            24   71   3080 ti         12   68
3080            10   60   3070 ti          8   43   3070             8   41   3060 ti          8   32
3060            12   25   3050             8   18
5090 laptop     24  114   5080 laptop     16   83   5070 ti laptop  12   62   5070 laptop      8   50
5060 laptop      8   36   4090 laptop     16   86   4080 laptop     12   68   4070 laptop      8   40
4060 laptop      8   29   4050 laptop      6   24   3080 ti laptop  16   47   3080 laptop      8   38
3070 ti laptop   8   33   3070 laptop      8   32   3060 laptop      6   22   3050 laptop      4   12
"""
_WITHOUT_BF16 = """
v100            16  125   t4              16   65   titan rtx       24   65   2080 ti         11   54
2080 super       8   45   2080             8   40   2070 super       8   36   2070             8   30
2060 super       8   29   2060             6   26
"""
"""Name, GB and TFLOP/s; the most common memory size if there are several."""


def _parse_table(table: str, bf16: bool) -> list[GpuSpec]:
    rows = re.findall(r"(\S+(?: \S+)*?) +(\d+) +(\d+)(?= {2,}|$)", table, flags=re.MULTILINE)
    return [GpuSpec(name, float(memory), float(tflops), bf16) for name, memory, tflops in rows]


GPUS = {gpu.name: gpu for gpu in (*_parse_table(_AMPERE_AND_LATER, True), *_parse_table(_WITHOUT_BF16, False))}
_BY_COMPACT_NAME = {name.replace(" ", ""): gpu for name, gpu in GPUS.items()}
_MEMORY = r"(?:(?<=[\s(_-])|(?<=^))(\d{1,3})(?:\s*gi?b?)?\)?$|(?<![a-z0-9])(\d{1,3})\s*gi?b?(?![a-z0-9])"
_LAPTOP = r"laptop|mobile|notebook|max-?q"
_NOISE = r"nvidia|geforce|tesla|quadro|rtx|gtx|gpu|graphics|generation|sxm\d?|pcie|hbm\d?e?|[^a-z0-9]"


def find_gpu(name: str) -> GpuSpec:
    """Return the GPU with a name as people write it: `RTX 4090`, `3060 12gb`, `A100-SXM4-40GB`, `4070 laptop`.

    A memory size in the name replaces the table's. Raises ConfigError for an unknown GPU.
    """
    words = re.sub(r"hbm\d?e?|sxm\d?", "", name.lower()).strip(" -_")
    memory = re.search(_MEMORY, words)
    if memory is not None:
        words = words[: memory.start()] + words[memory.end() :]
    laptop = re.search(_LAPTOP, words) is not None
    plain = re.sub(_NOISE, "", re.sub(_LAPTOP, "", words)) or words
    compact = "titanrtx" if plain == "titan" else plain + "laptop" * laptop
    gpu = _BY_COMPACT_NAME.get(compact)
    if gpu is None:
        family = [known for known in _BY_COMPACT_NAME if known[:2] == compact[:2]]
        close = difflib.get_close_matches(compact, family, n=1)
        hint = f"did you mean {_BY_COMPACT_NAME[close[0]].name}? Or " if close else ""
        raise ConfigError(f"--card {name}: unknown; {hint}give its memory with --memory GB")
    if memory is None:
        return gpu
    return replace(gpu, memory=float(memory[1] or memory[2]))
