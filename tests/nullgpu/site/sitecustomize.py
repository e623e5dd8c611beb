"""Imported by every Python process on the null GPU: does without cuDNN, which the stand-in lacks.

Garbage is collected less often: while the libraries are imported there is none.

Attention is the same without it. torch's own convolution would copy each patch of an image, 9 times an image's memory;
the one here returns a result, as cuDNN does.
"""

from __future__ import annotations

import gc
import importlib.abc
import importlib.machinery
import sys
from types import ModuleType
from typing import Any


class _WithoutCudnn(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds torch as usual, and acts after its module was executed."""

    def find_spec(self, name: str, path: object, target: object = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        module.backends.cudnn.enabled = False
        module.backends.cuda.enable_cudnn_sdp(False)
        _CONVOLUTION.append(module.library.Library("aten", "IMPL"))
        _CONVOLUTION[0].impl("_slow_conv2d_forward", _convolve, "CUDA")


_CONVOLUTION: list[Any] = []
"""The registration, which ends with its object."""


def _convolve(images: Any, weight: Any, kernel_size: Any, bias: Any, stride: Any, padding: Any) -> Any:
    sides = zip(images.shape[2:], kernel_size, stride, padding, strict=True)
    return images.new_empty(len(images), len(weight), *((n + 2 * pad - k) // step + 1 for n, k, step, pad in sides))


gc.set_threshold(50_000)
sys.meta_path.insert(0, _WithoutCudnn())
