"""Training methods: a file and an entry in METHODS for each."""

from __future__ import annotations

from typing import Protocol

from sd3tune.config.schema import Config
from sd3tune.config.sections.method_section import MethodSection
from sd3tune.config.variants import METHOD, Registry
from sd3tune.methods.base import Method, Product
from sd3tune.methods.dora import DoraMethod
from sd3tune.methods.full import FullMethod
from sd3tune.methods.loha import LohaMethod
from sd3tune.methods.lokr import LokrMethod
from sd3tune.methods.lora import LoraMethod
from sd3tune.methods.pivotal import PivotalMethod
from sd3tune.methods.textual_inversion import TextualInversionMethod
from sd3tune.model.base.base import Base


class MethodClass(Protocol):
    """The constructor of a method, with its product."""

    product: Product

    def __call__(self, config: Config, base: Base) -> Method: ...


METHODS: Registry[MethodClass] = Registry(
    METHOD,
    {
        "lora": LoraMethod,
        "dora": DoraMethod,
        "loha": LohaMethod,
        "lokr": LokrMethod,
        "full": FullMethod,
        "textual_inversion": TextualInversionMethod,
        "pivotal": PivotalMethod,
    },
)


def products() -> list[Product]:
    """Return the products of all methods, without duplicates."""
    return list(dict.fromkeys(method.product for method in METHODS.values()))


def register(section: type[MethodSection], method: MethodClass) -> None:
    """Register a method: `method(config, base)` returns a `methods.base.Method`; `config.method` is a `section`.

    Raises ValueError if the kind is already registered.
    """
    METHODS.register(section, method)


__all__ = ["METHODS", "FullMethod", "LoraMethod", "Method", "products", "register"]
