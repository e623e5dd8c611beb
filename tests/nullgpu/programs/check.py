"""The checks for a GPU, with their own arguments; the report's losses, which are zero here, are replaced.

After `waiting` as first argument, the host reads a number from the GPU in every step. After `uncompiled`, the paths
that torch compiles are left out, which takes a minute and a half.
"""

import sys

from benchmarks.gpu import checks
from benchmarks.gpu.check import main
from sd3tune.training import step
from tests.nullgpu.programs.matrix import with_results


def read_the_norm(gradient, max_norm):
    norm = clip(gradient, max_norm)
    norm.item()
    return norm


with_results()
arguments = sys.argv[1:]
if arguments[0] == "waiting":
    clip, step.clip_ = step.clip_, read_the_norm
    del arguments[0]
elif arguments[0] == "uncompiled":
    checks.PATHS = {name: path for name, path in checks.PATHS.items() if "compiled" not in name}
    del arguments[0]
sys.exit(main(arguments))
