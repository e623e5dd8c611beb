"""What can be trained: one file a method, one entry in METHODS."""

from __future__ import annotations

from typing import Protocol

from sd3tune.config.schema import Config
from sd3tune.config.sections.method import MethodSection
from sd3tune.config.variants import METHOD, Registry
from sd3tune.methods.base import Method, Product
from sd3tune.methods.full import FullMethod
from sd3tune.methods.lora import LoraMethod
from sd3tune.model.base.base import Base


class MethodClass(Protocol):
    """A class of methods."""

    product: Product

    def __call__(self, config: Config, base: Base) -> Method: ...


METHODS: Registry[MethodClass] = Registry(METHOD, {"lora": LoraMethod, "full": FullMethod})


def products() -> list[Product]:
    """What the methods make, each once."""
    return list(dict.fromkeys(method.product for method in METHODS.values()))


def register(section: type[MethodSection], method: MethodClass) -> None:
    """Add a method: `method(config, base)` is a `methods.base.Method`, and `config.method` a `section`.

    Raises ValueError for a kind that is there already.
    """
    METHODS.register(section, method)


__all__ = ["METHODS", "FullMethod", "LoraMethod", "Method", "products", "register"]
