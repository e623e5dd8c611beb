"""What can be trained: one file a method, one entry in METHODS."""

from __future__ import annotations

from collections.abc import Callable

from sd3tune.config.schema import Config
from sd3tune.methods.base import Method
from sd3tune.methods.full import FullMethod
from sd3tune.methods.lora import LoraMethod
from sd3tune.model.base.base import Base

METHODS: dict[str, Callable[[Config, Base], Method]] = {
    "lora": lambda config, base: LoraMethod(config),
    "full": FullMethod,
}
PRODUCTS = (LoraMethod.product, FullMethod.product)

__all__ = ["METHODS", "PRODUCTS", "FullMethod", "LoraMethod", "Method"]
