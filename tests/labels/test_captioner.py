"""A captioning model is loaded by transformers' own classes, and decodes greedily; faults are one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

from sd3tune.errors import ModelError
from sd3tune.labels.captioner import Captioner, load_captioner
from sd3tune.labels.loading import loaded
from sd3tune.model.base.pretrained import ModelSource
from tests.labels.small_models import END, save_captioner
from tests.measures.small_models import save_clip

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_captioner(tmp_path_factory.mktemp("captioner"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    plain = [Image.new("RGB", size, colour) for size, colour in (((96, 64), "red"), ((48, 80), "blue"))]
    return [*plain, Image.radial_gradient("L").convert("RGB")]


def opened(folder: Path) -> AbstractContextManager[Captioner]:
    source = ModelSource(str(folder))
    return loaded(source, CPU, lambda: load_captioner(source, folder, CPU, torch.float32))


def expected(folder: Path, picture: Image.Image, asked: str, most: int) -> tuple[str, bool]:
    """Return the greedy answer, token by token, each by a pass over all of the text without a cache."""
    model, processor = Qwen3VLForConditionalGeneration.from_pretrained(folder), Qwen3VLProcessor.from_pretrained(folder)
    text = f"<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>{asked}<|im_end|>\n<|im_start|>assistant\n"
    inputs: dict[str, Any] = dict(processor(text=[text], images=[picture], return_tensors="pt"))
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < most and END not in processor.tokenizer.convert_ids_to_tokens(answer):
            answer.append(int(model(**inputs).logits[0, -1].argmax()))
            for name, value in (("input_ids", answer[-1]), ("attention_mask", 1), ("mm_token_type_ids", 0)):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], torch.tensor([[value]])], dim=1)
    return processor.decode(answer, skip_special_tokens=True), END in processor.tokenizer.convert_ids_to_tokens(answer)


def test_answers_are_greedy_whatever_the_model_states(folder: Path, pictures: list[Image.Image]) -> None:
    with opened(folder) as captioner:
        found = [captioner.describe(picture, "Describe it.") for picture in pictures]
        short = Captioner(captioner.model, captioner._processor, most_tokens=2)
        cut = [short.describe(picture, "Describe it.") for picture in pictures]
        other = captioner.describe(pictures[0], "Say more.")
    assert [(one.text, one.complete) for one in found] == [
        expected(folder, one, "Describe it.", 120) for one in pictures
    ]
    assert [(one.text, one.complete) for one in cut] == [expected(folder, one, "Describe it.", 2) for one in pictures]
    assert not all(one.complete for one in cut)
    assert len({one.text for one in found} | {other.text}) == 4  # pictures and instructions are read


def test_a_folder_in_the_form_of_the_published_one_is_the_same(
    folder: Path, pictures: list[Image.Image], tmp_path: Path
) -> None:
    """Qwen/Qwen3-VL-2B-Instruct has its template in JSON, and a file for each preprocessor."""
    there = tmp_path / "published"
    shutil.copytree(folder, there)
    stated = json.loads((there / "processor_config.json").read_text())
    template = (there / "chat_template.jinja").read_text()
    for name in ("processor_config.json", "chat_template.jinja"):
        (there / name).unlink()
    images = {**stated["image_processor"], "image_processor_type": "Qwen2VLImageProcessorFast"}
    for name, values in (
        ("preprocessor_config.json", images),
        ("video_preprocessor_config.json", stated["video_processor"]),
        ("chat_template.json", {"chat_template": template}),
    ):
        (there / name).write_text(json.dumps(values))
    with opened(folder) as captioner, opened(there) as same:
        assert same.describe(pictures[0], "Describe it.") == captioner.describe(pictures[0], "Describe it.")


def test_half_precision_is_computed_in(folder: Path, pictures: list[Image.Image]) -> None:
    source = ModelSource(str(folder))
    with loaded(source, CPU, lambda: load_captioner(source, folder, CPU, torch.bfloat16)) as captioner:
        assert {parameter.dtype for parameter in captioner.model.parameters()} == {torch.bfloat16}
        assert captioner.describe(pictures[0], "Describe it.").text.strip()


def test_a_large_picture_is_scaled_down_and_stays_as_it_is(folder: Path) -> None:
    large = Image.radial_gradient("L").convert("RGB").resize((3000, 1500))
    with opened(folder) as captioner:
        seen: list[tuple[int, int]] = []
        template = captioner._processor.apply_chat_template

        def watch(messages: Any, **options: Any) -> Any:
            seen.append(messages[0]["content"][0]["image"].size)
            return template(messages, **options)

        captioner._processor.apply_chat_template = watch
        captioner.describe(large, "Describe it.")
    assert (seen, large.size) == ([(1024, 512)], (3000, 1500))


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def remove_a_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remove_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def needs_own_code(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}')


def is_no_language_model(folder: Path) -> None:
    shutil.rmtree(folder)
    save_clip(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (remove_weights, "cannot be loaded"),
        (remove_a_tensor, "tensor model.language_model.norm.weight is missing"),
        (remove_template, "has no chat template"),
        (break_config, "cannot be loaded"),
        (needs_own_code, "cannot be loaded"),
        (is_no_language_model, "has no chat template"),
    ],
)
def test_a_fault_of_the_model_is_one_line(
    damage: Callable[[Path], None], says: str, folder: Path, tmp_path: Path
) -> None:
    there = tmp_path / "model"
    shutil.copytree(folder, there)
    damage(there)
    with (
        pytest.raises(ModelError) as caught,
        opened(there),
    ):
        pass
    (line,) = caught.value.problems
    assert line.startswith(f"{there}: ")
    assert says in line
    assert "\n" not in line
