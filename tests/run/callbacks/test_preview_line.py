"""A terminal shows a step's new previews while the run trains."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from sd3tune import reporting
from sd3tune.commands.train import run_training


class Terminal(reporting.Reporter):
    """A reporter that keeps the pictures."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.shown: list[tuple[str, Image.Image]] = []

    def picture(self, text: str, png: Callable[[], bytes]) -> None:
        self.shown.append((text, Image.open(io.BytesIO(png()))))


def test_a_step_shows_its_pictures_side_by_side(quick_config, tmp_path: Path) -> None:
    previews = ["preview.prompts=[a dog, a cat]", "preview.every=2", "preview.steps=1", "train.steps=2"]
    with reporting.using(Terminal()) as terminal:
        run_training(quick_config(tmp_path / "run", *previews, "data.resolution=32"))
    samples = tmp_path / "run" / "samples"
    assert [text for text, _ in terminal.shown] == [
        f"preview   {samples}/step-000000-0.png and 1 more",
        f"preview   {samples}/step-000002-0.png and 1 more",
    ]
    assert all(image.width > 1.8 * image.height for _, image in terminal.shown)
