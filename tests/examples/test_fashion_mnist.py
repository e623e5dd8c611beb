"""The run on Fashion-MNIST and what measures it, in small: other pictures, on the base tiny, for two steps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.fashion_mnist import measure
from examples.nano.render import png
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.data.sources.dataset import write_parquet

CONFIG = Path(measure.__file__).with_name("fashion_mnist.yaml")
NAMES = ("Bag", "Coat")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.parquet and test.parquet: dark bags and bright coats."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in (("train", 12), ("test", 6)):
        shades = [(n, 40 + n if n % 2 else 200 + n, NAMES[1 - n % 2]) for n in range(count)]
        rows = [(f"{n}.png", png(Image.new("L", (28, 28), shade)), caption) for n, shade, caption in shades]
        write_parquet(folder / f"{name}.parquet", rows)
    return folder


def test_the_judge_reads_real_pictures_right(data: Path) -> None:
    known, captions = measure.labelled(data / "train.parquet")
    real, truth = measure.labelled(data / "test.parquet")
    assert (known.shape, set(truth)) == ((12, 784), set(NAMES))
    assert measure.share_right(measure.read(real, known, captions), truth) == 1
    assert measure.share_right(measure.read(1 - real, known, captions), truth) == 0


def test_of_equally_many_neighbours_the_nearest_decides() -> None:
    known = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]]).repeat(1, 784)
    names = ["Coat", "Bag", "Bag", "Coat", "Dress"]
    assert measure.read(torch.zeros(1, 784), known, names) == ["Coat"]


def test_the_configuration_trains_and_its_result_is_measured(data: Path, tmp_path: Path, capsys) -> None:
    changes = (
        "model.base=tiny", "model.dtype=fp32", f"data.sources.0.path={data / 'train.parquet'}",
        f"data.cache_dir={tmp_path / 'store'}", f"output_dir={tmp_path}", "train.steps=2", "train.batch_size=2",
        "schedule.warmup_steps=0", "validation.holdout=2", "preview={prompts: [Bag], steps: 1}",
    )  # fmt: skip
    run_training(load_config(CONFIG, changes).config)
    measure.main([str(tmp_path), "--each", "1", "--data", str(data)])
    printed = capsys.readouterr().out
    assert "| sigma | step 0 | step 2 |\n" in printed
    assert "| 6 real ones | 100.0% |\n" in printed
    assert "| 2 drawn ones | " in printed
