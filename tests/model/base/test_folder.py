"""A whole model in diffusers' layout: complete, small where it can be, and with the contract that `infer` applies."""

from __future__ import annotations

import errno
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.folder import write_model
from sd3tune.model.base.parts import MODEL_INDEX
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_scheduler, load_transformer

CONTRACT: dict[str, Any] = {
    "base": "tiny", "max_sequence_length": 16, "resolution": 64, "encoders": ["clip_l", "clip_g", "t5"],
}  # fmt: skip
WITHOUT_T5 = {**CONTRACT, "encoders": ["clip_l", "clip_g"]}


@pytest.fixture
def base() -> Base:
    return resolve_base("tiny")


@pytest.fixture
def tensors(base: Base) -> dict[str, Tensor]:
    return {name: (2 * value).half() for name, value in load_transformer(base, torch.float32).state_dict().items()}


def shared(folder: Path, base: Base) -> dict[str, bool]:
    """Whether a file is one with the base's; by its name in the folder, the transformer left aside."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {
        str(name): (base.path / name).exists() and os.path.samefile(folder / name, base.path / name)
        for name in files
        if name.parts[0] != "transformer"
    }


def test_it_is_complete_and_what_was_not_trained_takes_no_room(base: Base, tensors, tmp_path: Path) -> None:
    index = write_model(tmp_path / "model", base, tensors, CONTRACT, shift=None)
    assert index == tmp_path / "model" / "model_index.json"
    theirs = {str(path.relative_to(base.path)) for path in base.path.rglob("*") if path.is_file()}
    ours = {str(path.relative_to(tmp_path / "model")) for path in (tmp_path / "model").rglob("*") if path.is_file()}
    assert ours == theirs | {"sd3tune.json"}
    assert {name for name, is_shared in shared(index.parent, base).items() if not is_shared} == {
        "model_index.json", "sd3tune.json",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_plain_pipeline_loads_it_without_a_warning(base, tensors, tmp_path, caplog, monkeypatch) -> None:
    write_model(tmp_path / "model", base, tensors, CONTRACT, shift=2.0)
    logger = diffusers_logging.get_logger("diffusers")
    monkeypatch.setattr(logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        pipeline = StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    assert not caplog.records
    assert pipeline.scheduler.config.shift == 2.0
    assert load_scheduler(base).config.shift == 3.0
    loaded = pipeline.transformer.state_dict()
    assert all(torch.equal(loaded[name], value.float()) for name, value in tensors.items())
    assert dict(pipeline.transformer.config)["dual_attention_layers"] == [0, 1]


def test_without_t5_it_is_left_out(base: Base, tensors, tmp_path: Path) -> None:
    write_model(tmp_path / "model", base, tensors, WITHOUT_T5, shift=None)
    assert not (tmp_path / "model" / "text_encoder_3").exists()
    with pytest.raises(ValueError, match=r"expected .*text_encoder_3"):  # rather than draw with what it never saw
        StableDiffusion3Pipeline.from_pretrained(tmp_path / "model")
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "model", text_encoder_3=None, tokenizer_3=None)
    assert "text_encoder_3" in MODEL_INDEX


def test_a_snapshot_of_links_as_the_hubs_cache_is_one_is_resolved(base: Base, tensors, tmp_path: Path) -> None:
    for path in base.path.rglob("*"):
        if path.is_file():
            link = tmp_path / "snapshot" / path.relative_to(base.path)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    write_model(tmp_path / "model", resolve_base(str(tmp_path / "snapshot")), tensors, CONTRACT, shift=None)
    assert not any(path.is_symlink() for path in (tmp_path / "model").rglob("*"))
    assert shared(tmp_path / "model", base)["vae/config.json"]


def test_on_another_disk_the_parts_are_copies(base: Base, tensors, tmp_path: Path, monkeypatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    write_model(tmp_path / "model", base, tensors, CONTRACT, shift=None)
    assert not any(shared(tmp_path / "model", base).values())
    copied = resolve_base(str(tmp_path / "model"))
    assert all(copied.fingerprint(part) == base.fingerprint(part) for part in ("vae", "text_encoder_3", "tokenizer"))


def test_a_model_that_is_replaced_leaves_the_base_alone(base: Base, tensors, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in base.path.rglob("*") if path.is_file()}
    for shift in (None, 2.0, None):
        write_model(tmp_path / "model", base, tensors, CONTRACT, shift)
    assert {path: path.stat().st_mtime_ns for path in base.path.rglob("*") if path.is_file()} == before


def test_the_contract_is_read_back_and_other_folders_have_none(base: Base, tensors, tmp_path: Path) -> None:
    write_model(tmp_path / "model", base, tensors, CONTRACT, shift=None)
    assert resolve_base(str(tmp_path / "model")).contract == {"contract_version": 1, **CONTRACT}
    assert base.contract == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not valid JSON"),
        (json.dumps({"resolution": "big"}), "resolution"),
        (json.dumps({"contract_version": 9}), "newer sd3tune"),
        (json.dumps({"encoders": ["clip_l", "t5"]}), "lacks clip_l or clip_g"),
    ],
)
def test_a_contract_that_nobody_could_apply_names_its_file(base, tensors, tmp_path, text: str, says: str) -> None:
    write_model(tmp_path / "model", base, tensors, CONTRACT, shift=None)
    (tmp_path / "model" / "sd3tune.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        resolve_base(str(tmp_path / "model")).contract  # noqa: B018
    assert caught.value.problems[0].startswith(str(tmp_path / "model" / "sd3tune.json"))
    assert says in caught.value.problems[0]


def test_the_folder_of_a_run_is_no_base_and_the_model_in_it_is(base: Base, tensors, tmp_path: Path) -> None:
    write_model(tmp_path / "run" / "model", base, tensors, CONTRACT, shift=None)
    with pytest.raises(ModelError, match=r"did you mean '.*/run/model'\?"):
        resolve_base(str(tmp_path / "run"))
