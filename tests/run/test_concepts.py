"""Two subjects in one adapter: balanced draws, triggers, priors and weights of their own."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from sd3tune.adapter.file import read_adapter
from sd3tune.commands.train import run_training
from sd3tune.config import Config
from sd3tune.errors import ConfigError, RunError
from sd3tune.run.batches import make_batches
from sd3tune.run.contract import make_contract
from sd3tune.run.describe import describe
from sd3tune.run.encoding import encode
from sd3tune.run.preflight import Plan, make_plan
from sd3tune.runtime.processes import ALONE
from sd3tune.training.batches import Batch
from sd3tune.training.loop import View

CPU = torch.device("cpu")
EQUAL = "data.balance=equal"


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `dog` of two pictures and a folder `toy` of five, of two shapes."""
    folder = tmp_path_factory.mktemp("subjects")
    for name, count in (("dog", 2), ("toy", 5)):
        (folder / name).mkdir()
        for number in range(count):
            size = (112, 64) if number == 1 else (72, 72)
            colour = (40 * number, 200 * (name == "dog"), 90)
            Image.new("RGB", size, colour).save(folder / name / f"{name}-{number}.png")
    return folder


@pytest.fixture(scope="module")
def config(quick_config, subjects: Path):
    """`config(run, *overrides, dog="", toy="")`: a run on both subjects; `dog` and `toy` add keys to their sources."""

    def make(run: Path, *overrides: str, dog: str = "", toy: str = "") -> Config:
        sources = (
            f"{{path: {subjects}/dog, name: dog, trigger: sks, caption: a photo of a dog{dog}}}",
            f"{{path: {subjects}/toy, name: toy, trigger: zwx, caption: a photo of a toy{toy}}}",
        )
        return quick_config(run, f"data.sources=[{', '.join(sources)}]", *overrides)

    return make


def fetched(config: Config, steps: int, rank: int = 0, world: int = 1) -> tuple[Plan, list[Batch], list[list[str]]]:
    """Return the plan, the first batches of a rank, and the concepts of each step."""
    plan = make_plan(config, CPU, None, world)
    encoded = encode(plan, ALONE, lambda line: None)
    batches = make_batches(plan, encoded, dataclasses.replace(ALONE, rank=rank, world=world))
    found = [batches.fetch(step, 0) for step in range(steps)], [batches.concepts(step) for step in range(steps)]
    batches.close()
    return plan, *found


def drawn(config: Config, steps: int) -> Counter[str]:
    _, batches, _ = fetched(config, steps)
    return Counter(name for batch in batches for name in batch.names)


@pytest.mark.parametrize(
    ("balance", "dogs", "toys"), [("null", 20, 50), ("equal", 35, 35), ("{dog: 2.5}", 50, 20), ("{toy: 6}", 10, 60)]
)
def test_concepts_are_drawn_in_their_shares(config, tmp_path: Path, balance: str, dogs: int, toys: int) -> None:
    """Over ten epochs of seven samples, within one sample for each of the two shapes."""
    found = drawn(config(tmp_path, f"data.balance={balance}"), 70)
    of_dogs = sum(count for name, count in found.items() if name.startswith("dog"))
    assert (of_dogs, 70 - of_dogs) == (pytest.approx(dogs, abs=1), pytest.approx(toys, abs=1))
    for name in ("dog", "toy"):
        times = [count for image, count in found.items() if image.startswith(name)]
        assert max(times) - min(times) <= 2


def test_sources_of_one_name_are_one_concept(config, subjects: Path, quick_config, tmp_path: Path) -> None:
    """A source without a name is one by itself."""
    sources = [
        f"{{path: {subjects}/{folder}, caption: a thing{name}}}"
        for folder, name in (("dog", ", name: pet"), ("toy", ""), ("dog", ", name: pet"))
    ]
    found = drawn(quick_config(tmp_path, f"data.sources=[{', '.join(sources)}]", EQUAL, "data.buckets=false"), 36)
    assert sum(count for name, count in found.items() if name.startswith("dog")) == 18


def test_two_ranks_draw_what_one_draws(config, tmp_path: Path) -> None:
    whole = fetched(config(tmp_path, EQUAL, "train.batch_size=2"), 12)
    ranks = [fetched(config(tmp_path, EQUAL), 12, rank, 2) for rank in (0, 1)]
    for step in range(12):
        batch, parts = whole[1][step], [found[1][step] for found in ranks]
        assert list(batch.names) == [*parts[0].names, *parts[1].names]
        assert torch.equal(batch.latents, torch.cat([part.latents for part in parts]))
        assert whole[2][step] == ranks[0][2][step] == ranks[1][2][step]
        assert [name.partition("-")[0] for name in batch.names] == whole[2][step]


def test_the_start_says_how_often_images_are_seen(config, tmp_path: Path) -> None:
    made = config(tmp_path, EQUAL, "train.steps=28")
    found = drawn(made, 28)
    lines = describe(make_plan(made, CPU, None), 1)
    assert "concepts  dog: 2 images, sks; toy: 5 images, zwx; drawn equally often" in lines
    assert any(line.endswith(f"seen {min(found.values())} to {max(found.values())} times") for line in lines)


def test_captions_and_the_held_out_folder_have_the_trigger_of_their_concept(
    config, subjects: Path, tmp_path: Path
) -> None:
    plan = make_plan(config(tmp_path, "data.trigger=all", f"validation.holdout={subjects}/dog"), CPU, None)
    assert {record.caption for record in plan.records} == {"sks, a photo of a dog", "zwx, a photo of a toy"}
    assert {record.caption for record in plan.holdout} == {"sks, a photo of a dog"}


def test_each_concept_has_its_own_prior_and_weights(config, tmp_path: Path) -> None:
    _, batches, concepts = fetched(
        config(
            tmp_path,
            EQUAL,
            dog=", weight: 0.5, prior: {kind: prediction, prompt: a dog, weight: 0.25}",
            toy=", prior: {kind: prediction, prompt: a toy, weight: 2}",
        ),
        6,
    )
    weights = {concept[0]: batch.weights.tolist() for batch, concept in zip(batches, concepts, strict=True)}
    assert weights == {"dog": [0.5, 0.25], "toy": [1.0, 2.0]}


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "subjects"
    run_training(config(run, *RUN))
    return run


RUN = (EQUAL, "data.resolution=[64, 80]", "data.enlarge=true", "train.steps=6", "train.batch_size=2",
       "checkpoint.every=2")  # fmt: skip


def test_a_run_stopped_and_resumed_equals_one_never_stopped(
    config, finished: Path, tmp_path: Path, assert_equal_runs
) -> None:
    def stop(view: View) -> None:
        if view.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(config(tmp_path, *RUN), callbacks=[stop])
    run_training(config(tmp_path, *RUN), resume=True)
    assert_equal_runs(finished, tmp_path)


def test_other_shares_are_refused_on_resuming(config, finished: Path) -> None:
    with pytest.raises(RunError) as caught:
        run_training(config(finished, *RUN, "data.balance={dog: 3}"), resume=True)
    assert any(line.startswith("--resume: data.balance: ") for line in caught.value.problems)


def test_the_result_lists_the_concepts_and_their_triggers(finished: Path) -> None:
    adapter = read_adapter(finished)
    assert adapter.contract["concepts"] == [{"name": "dog", "trigger": "sks"}, {"name": "toy", "trigger": "zwx"}]
    assert adapter.contract["trigger"] == "sks, zwx"
    assert adapter.metadata["trained_words"] == adapter.metadata["modelspec.trigger_phrase"] == "sks, zwx"
    card = (finished / "README.md").read_text()
    assert "- `dog`: include `sks` in the prompt\n- `toy`: include `zwx` in the prompt" in card
    assert "| concepts | `dog`, `toy`; drawn each concept equally often |" in card


def test_the_metrics_have_the_loss_of_each_concept(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert {concept for line in lines for concept in line["loss_by_concept"]} == {"dog", "toy"}
    for line in lines:
        assert (
            min(line["loss_by_concept"].values())
            <= line["loss"] * (1 + 1e-6)
            <= max(line["loss_by_concept"].values()) * (1 + 2e-6)
        )


def test_a_run_without_concepts_does_not_mention_them(quick_config, tmp_path: Path) -> None:
    plan, _, concepts = fetched(quick_config(tmp_path), 1)
    assert concepts == [[]]
    assert "concepts" not in make_contract(plan)
    assert not [line for line in describe(plan, 1) if line.startswith("concepts")]


@pytest.mark.parametrize(
    ("balance", "problem"),
    [
        ("{cat: 2}", r"balance: 'cat' is not the name of a source; the names are dog, toy"),
        ("{dog: 0}", r"data\.balance\.dog: 0 is too small; must be above 0"),
        ("often", r"data\.balance.*'often' is neither 'equal' nor a section of keys"),
    ],
)
def test_a_wrong_balance_is_explained(config, tmp_path: Path, balance: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        config(tmp_path, f"data.balance={balance}")
