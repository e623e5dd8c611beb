"""The checks for a GPU, with their own arguments; the report's losses, which are zero here, are replaced.

After `uncompiled` as first argument, the paths that torch compiles are left out, which takes a minute and a half. First
come steps in which the host reads a number from the GPU; the fact `waiting` has the exit code of their check.
"""

import sys

from benchmarks.gpu import checks
from benchmarks.gpu.check import main
from sd3tune.training import step
from tests.nullgpu.counts import fact
from tests.nullgpu.programs.matrix import with_results


def read_the_norm(gradient, max_norm):
    norm = clip(gradient, max_norm)
    norm.item()
    return norm


with_results()
arguments = sys.argv[1:]
if arguments[0] == "uncompiled":
    checks.PATHS = {name: path for name, path in checks.PATHS.items() if "compiled" not in name}
    del arguments[0]
clip, step.clip_ = step.clip_, read_the_norm
fact("waiting", main([*arguments, "--only", "steady steps"]))
step.clip_ = clip
sys.exit(main(arguments))
