"""What can be trained: one file a method, one entry in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sd3tune.methods.base import Method
from sd3tune.methods.lora import LoraMethod

METHODS: dict[str, Callable[[Any], Method]] = {"lora": LoraMethod}

__all__ = ["METHODS", "LoraMethod", "Method"]
