"""CLIPSeg is loaded by transformers' own classes; its square becomes a mask of the whole picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPSegForImageSegmentation, CLIPSegProcessor

from sd3tune.errors import ModelError
from sd3tune.labels.loading import loaded
from sd3tune.labels.segmenter import Segmenter, load_segmenter
from sd3tune.model.base.pretrained import ModelSource
from tests.labels.small_models import save_segmenter
from tests.measures.small_models import save_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segmenter(tmp_path_factory.mktemp("segmenter"))


@pytest.fixture(scope="module")
def segmenter(folder: Path) -> Iterator[Segmenter]:
    source = ModelSource(str(folder))
    with loaded(source, CPU, lambda: load_segmenter(source, folder, CPU)) as segmenter:
        yield segmenter


def probabilities(folder: Path, picture: Image.Image, prompt: str) -> np.ndarray:
    """Return transformers' own map, float32."""
    model, processor = CLIPSegForImageSegmentation.from_pretrained(folder), CLIPSegProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = model(**processor(text=[prompt], images=[picture], return_tensors="pt")).logits
    return logits.squeeze().sigmoid().numpy()


@pytest.mark.parametrize(("prompt", "threshold", "ramp"), [("dog", 0.5, 0.1), ("cat", 0.05, 0.05)])
def test_a_mask_is_the_map_with_a_ramp_at_the_threshold(
    prompt: str, threshold: float, ramp: float, folder: Path, segmenter: Segmenter
) -> None:
    picture = Image.radial_gradient("L").convert("RGB").crop((0, 0, 200, 90))
    likely = probabilities(folder, picture, prompt)
    found = segmenter.find(picture, prompt, (180, 400), threshold)
    enlarged = np.asarray(Image.fromarray(likely).resize((400, 180), Image.Resampling.BILINEAR), dtype=np.float64)
    expected = np.clip((enlarged - (threshold - ramp)) / (2 * ramp), 0, 1) * 255
    mask = np.asarray(found.mask, dtype=np.float64)
    assert (found.mask.mode, found.mask.size) == ("L", (400, 180))
    assert np.abs(mask - expected).max() <= 0.51
    assert np.unique(mask).size > 20
    assert found.likeliest == pytest.approx(likely.max(), abs=1e-6)
    assert found.coverage == pytest.approx(expected.mean() / 255, abs=1e-3)


def test_a_folder_in_the_form_of_the_published_one_is_the_same(
    folder: Path, segmenter: Segmenter, tmp_path: Path
) -> None:
    """CIDAS/clipseg-rd64-refined has weights in PyTorch's format, a tokenizer in two files, and one preprocessor."""
    there = tmp_path / "model"
    shutil.copytree(folder, there)
    stated = json.loads((there / "processor_config.json").read_text())["image_processor"]
    (there / "preprocessor_config.json").write_text(json.dumps({**stated, "processor_class": "CLIPSegProcessor"}))
    for name in ("processor_config.json", "tokenizer.json"):
        (there / name).unlink()
    torch.save(load_file(there / "model.safetensors"), there / "pytorch_model.bin")
    (there / "model.safetensors").unlink()
    picture, source = Image.radial_gradient("L").convert("RGB"), ModelSource(str(there))
    with loaded(source, CPU, lambda: load_segmenter(source, there, CPU)) as same:
        found = [np.asarray(one.find(picture, "dog", (64, 64), 0.5).mask, dtype=int) for one in (same, segmenter)]
    assert np.abs(found[0] - found[1]).max() <= 1
    assert found[0].std() > 50
    assert same.model is None


def test_another_kind_of_model_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = save_clip(tmp_path)
    source = ModelSource(str(folder))
    with (
        pytest.raises(ModelError, match=r"is a clip model; name a CLIPSeg model with --model$"),
        loaded(source, CPU, lambda: load_segmenter(source, folder, CPU)),
    ):
        pass
