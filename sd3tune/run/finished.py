"""A finished run for the Python API: its folder, weights, metrics and report."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd3tune.config.run_folder import METRICS_FILE, read_run_file
from sd3tune.errors import RunError
from sd3tune.methods import products
from sd3tune.training.metrics import read_metrics


@dataclass(frozen=True)
class Run(os.PathLike[str]):
    """A run folder, accepted wherever a path or an adapter is."""

    folder: Path

    def __fspath__(self) -> str:
        return str(self.folder)

    @property
    def product(self) -> Path:
        """The folder of the trained weights: `adapter`, or `model` for a full fine-tune. Raises RunError."""
        for product in products():
            if product.is_in(self.folder):
                return self.folder / product.name
        raise RunError(f"{self.folder}: holds no trained weights; train it to its end, with resume=True")

    @property
    def adapter(self) -> Path:
        """The folder of the adapter, which diffusers can also load. Raises RunError for a full fine-tune."""
        product = self.product
        if product.name != "adapter":
            raise RunError(f"{self.folder}: trained a whole model, not an adapter; it is in {product}")
        return product

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`, one per logged step, ready for `pandas.DataFrame(run.metrics)`."""
        return read_metrics(self.folder / METRICS_FILE)

    @property
    def report(self) -> dict[str, Any]:
        """The closing report in `run.json`: losses at fixed noise, change of a step, held-out loss; may be empty."""
        report = read_run_file(self.folder).get("report", {})
        return report if isinstance(report, dict) else {}

    def __str__(self) -> str:
        return str(self.folder)

    def _repr_html_(self) -> str:
        rows = [("run", self.folder), ("weights", self.product), ("steps logged", len(self.metrics))]
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(str(value))}</td></tr>" for name, value in rows)
        return f"<table>{cells}</table>"
