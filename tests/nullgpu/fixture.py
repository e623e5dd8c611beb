"""The fixture `null_gpu`, for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from tests.nullgpu.build import CannotBuild, build
from tests.nullgpu.run import Ran, run_on_null_gpu

NullGpu = Callable[..., Ran]

REQUIRED = "SD3TUNE_NULLGPU"
"""Environment variable: with `require`, tests fail where they would be skipped."""


@pytest.fixture(scope="session")
def null_gpu() -> NullGpu:
    """`null_gpu("-c", code, gb=24)`: Python on a GPU that computes nothing; see `run_on_null_gpu`."""
    try:
        build()
    except CannotBuild as reason:
        if os.environ.get(REQUIRED) == "require":
            pytest.fail(f"{REQUIRED}=require: {reason}")
        pytest.skip(str(reason))
    return run_on_null_gpu
