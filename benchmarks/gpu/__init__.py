"""sd3tune's step compared with diffusers' example on one GPU, at the full sizes of SD3 and SD3.5, with random weights.

`python -m benchmarks.gpu.bundle OUT` prepares a folder of wheels on a machine with a package index;
`python -m benchmarks.gpu.run --bundle OUT` measures on one without.
"""
