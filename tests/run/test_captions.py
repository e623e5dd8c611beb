"""Runs with several captions an image, variants of captions, and captions per encoder."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.data_convert import convert
from sd3tune.commands.infer import run_infer
from sd3tune.commands.plan import plan_lines
from sd3tune.commands.train import run_training
from sd3tune.config import parse_config
from sd3tune.data.sources.from_path import source_of
from sd3tune.data.store import Store
from sd3tune.errors import RunError
from sd3tune.inference.job import InferenceJob
from sd3tune.model.load.components import load_text_encoder
from sd3tune.run.batches import make_batches
from sd3tune.run.contract import make_contract, run_identity
from sd3tune.run.describe import describe
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import make_plan
from sd3tune.runtime.processes import ALONE

CPU = torch.device("cpu")
FORMS = ("sidecar", "jsonl", "csv", "parquet")


@pytest.fixture(scope="module")
def twelve(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve photos in two shapes, each with 1 to 3 captions for CLIP and as many for T5."""
    folder = tmp_path_factory.mktemp("captions") / "photos"
    folder.mkdir()
    for number in range(12):
        Image.new("RGB", (64 + 32 * (number % 2), 64), (20 * number, 100, 0)).save(folder / f"{number:02}.png")
        for name, text in (("txt", "sks dog {}, {}"), ("t5.txt", "No. {}, {}: dog.")):
            lines = [text.format(number, count) for count in range(1 + number % 3)]
            (folder / f"{number:02}.{name}").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def forms(twelve: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Each form as an entry of `data.sources`; the first is the folder itself."""
    import datasets

    root = tmp_path_factory.mktemp("forms")
    data = parse_config({"data": {"sources": [{"path": str(twelve), "captions": "lines"}]}}).config.data
    places = {form: root / (form if form != "parquet" else "x.parquet") for form in FORMS}
    for form, place in places.items():
        convert(data, form, place)
    saved = datasets.load_dataset("parquet", data_files=str(places["parquet"]), split="train")
    saved.save_to_disk(str(root / "saved"))
    (root / "kohya").mkdir()
    shutil.copytree(twelve, root / "kohya" / "1_dog")
    return {
        "folder": {"path": str(twelve)},
        **{form: source_of(str(place)) for form, place in places.items()},
        "saved": source_of(str(root / "saved")),
        "kohya": {"path": str(root / "kohya"), "layout": "kohya"},
        "recursive": {"path": str(root / "kohya"), "recursive": True},
    }


def sources(source: dict[str, Any], **more: object) -> str:
    return f"data.sources={json.dumps([{**source, 'captions': 'lines', **more}])}"


def test_every_form_gives_the_same_encodings(forms, quick_config, tmp_path) -> None:
    identities = {}
    for name, source in forms.items():
        plan = make_plan(
            quick_config(tmp_path / name, sources(source), f"data.cache_dir={tmp_path / 'store'}"), CPU, None
        )
        said: list[str] = []
        encoded = encode(plan, ALONE, said.append)
        assert ("images: 12, all reused" in said) == (name != "folder")
        identities[name] = run_identity(plan, encoded, 1)["data"]
    assert all(identity == identities["folder"] for identity in identities.values())


def test_forms_give_equal_stores_and_adapters(forms, quick_config, tmp_path, assert_equal_runs) -> None:
    stores = []
    for name in ("folder", "csv"):
        store = tmp_path / f"store-{name}"
        overrides = (sources(forms[name]), f"data.cache_dir={store}", "train.batch_size=2", "train.steps=2")
        run_training(quick_config(tmp_path / name, *overrides))
        opened = Store(store)
        stores.append({key: opened.get(key) for key in opened._index})
        assert_equal_runs(tmp_path / "folder", tmp_path / name)
    assert len(stores[0]) == 12 + 2 * 24 + 24  # CLIP-L and CLIP-G read 24 texts, and T5 24 others
    for store in stores[1:]:
        assert store.keys() == stores[0].keys()
        assert all(torch.equal(store[key][part], of) for key, entry in stores[0].items() for part, of in entry.items())


@pytest.mark.parametrize("world", [1, 2])
def test_pictures_meet_their_own_texts_in_buckets_and_on_two_ranks(twelve, quick_config, tmp_path, world) -> None:
    config = quick_config(tmp_path, sources({"path": str(twelve)}), "train.batch_size=2")
    plan = make_plan(config, CPU, None, world)
    encoded = encode(plan, ALONE, lambda line: None)
    known: dict[str, list[tuple[str, torch.Tensor]]] = {}
    for encoder, ending in (("clip_g", "txt"), ("t5", "t5.txt")):
        load = load_text_encoder(plan.base, encoder, torch.float32, max_sequence_length=16)
        known[encoder] = [
            (file.name.partition(".")[0], load.encode([line])[0]["hidden"])
            for file in sorted(twelve.glob(f"[0-9][0-9].{ending}"))
            for line in file.read_text().split("\n")
        ]
    seen, shapes = set(), set()
    for rank in range(world):
        batches = make_batches(plan, encoded, dataclasses.replace(ALONE, rank=rank, world=world))
        for step in range(60 // world):
            batch = batches.fetch(step, 0)
            shapes.add(batch.latents.shape)
            for row, name in enumerate(batch.names):
                places = [
                    [
                        n
                        for n, (_, hidden) in enumerate(of)
                        if torch.equal(hidden, batch.embeddings[encoder]["hidden"][row])
                    ]
                    for encoder, of in known.items()
                ]
                assert places[0] == places[1]  # the two texts belong together
                assert [known["t5"][place][0] for place in places[0]] == [name.removesuffix(".png")]
                seen.update(places[0])
        batches.close()
    assert len(shapes) == 2
    assert len(seen) == 24


def test_a_run_with_variants_resumes_exactly_and_refuses_others(
    twelve, quick_config, tmp_path, assert_equal_runs
) -> None:
    def stop(view) -> None:
        if view.step == 2:
            raise InterruptedError

    several = sources({"path": str(twelve)}, tags={"dropout": 0.3}, variants=4)
    settings = ("train.batch_size=2", "train.steps=4", "checkpoint.every=1")
    run_training(quick_config(tmp_path / "straight", several, *settings))
    config = quick_config(tmp_path / "run", several, *settings)
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop])
    with pytest.raises(RunError) as caught:
        run_training(quick_config(tmp_path / "run", several.replace("0.3", "0.4"), *settings), resume=True)
    assert caught.value.problems[0] == "--resume: data.captions: not the same captions as in the run"
    run_training(config, resume=True)
    assert_equal_runs(tmp_path / "straight", tmp_path / "run")


def test_the_held_out_loss_uses_the_first_caption_without_variants(twelve, quick_config, tmp_path) -> None:
    settings = (sources({"path": str(twelve)}, tags={"dropout": 0.5}), f"validation.holdout={twelve}")
    plan = make_plan(quick_config(tmp_path, *settings), CPU, None)
    encoded = encode(plan, ALONE, lambda line: None)
    assert not any(example.choices for example in encoded.holdout)
    keys = {key: text for text, key in encoded.captions["clip_l"].items()}
    assert [keys[example.captions["clip_l"]] for example in encoded.holdout] == [f"sks dog {n}, 0" for n in range(12)]


def test_the_disk_space_of_variants_is_said_before_they_are_encoded(twelve, quick_config, tmp_path, capsys) -> None:
    settings = (sources({"path": str(twelve)}, tags={}, variants=6), "model.max_sequence_length=32", "seed=3")
    config = quick_config(tmp_path, *settings, f"data.cache_dir={tmp_path / 'store'}")
    plan = make_plan(config, CPU, None)
    (line,) = (line for line in describe(plan, 1) if line.startswith("captions") and "variants" in line)
    assert line in plan_lines(config)  # a generator, which has not come to the dear lines yet
    encoded = encode(plan, ALONE, lambda line: None)
    keys = {key for example in encoded.examples for captions in example.choices for key in captions.values()}
    expected = f"{encoded.store.nbytes(keys) / 1e6:.1f} MB in the store"
    assert f"one drawn a step: {expected}, " in line
    assert line.endswith(" each (variants: 6)")


def test_the_contract_states_which_encoders_read_texts_of_their_own(twelve, quick_config, tmp_path, capsys) -> None:
    run_training(quick_config(tmp_path / "run", sources({"path": str(twelve)}), "train.steps=1"))
    assert read_adapter(tmp_path / "run").contract["own_texts"] == ["t5"]
    assert "captions  T5 reads texts of its own; `infer` takes them with --prompt-t5, and" in capsys.readouterr().out
    settings = {"loras": [str(tmp_path / "run")], "out": tmp_path / "images", "steps": 1, "before": False}
    run_infer(InferenceJob.from_fields(**settings, prompt="a (red:1.2) dog", num=2))
    printed = capsys.readouterr().out
    assert printed.count("trained with texts of single encoders; --prompt-t5 can give them") == 1
    assert printed.count("note: prompt weights such as '(red:1.2)' are read as plain text") == 1
    plain = make_plan(quick_config(tmp_path / "plain"), CPU, None)
    assert "own_texts" not in make_contract(plain)
    assert not any(line.startswith("captions") for line in describe(plan=plain, world=1))
