"""Imported by every Python process on the null GPU: switches cuDNN off once torch is imported.

The stand-in has no cuDNN. Convolutions then take torch's own kernels, and attention is the same without it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from types import ModuleType


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


sys.meta_path.insert(0, _WithoutCudnn())
