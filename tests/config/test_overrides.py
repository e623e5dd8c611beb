"""`key=value` from the command line goes through the same checks as the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd3tune.config import LoadedConfig, load_config
from sd3tune.errors import ConfigError

RUN = """\
data:
  sources:
    - {path: ./dog, caption: a dog}
    - {path: ./cat, caption: a cat}
flow:
  timesteps: {kind: logit_normal, mean: 0.5}
  weighting: {kind: min_snr, gamma: 3.0}
ema: null
train: {steps: 20}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    return path


def problems(run: Path, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load_config(run, overrides)
    return caught.value.problems


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=5", "train.steps", 5),
        ("optimizer.lr=3e-5", "optimizer.lr", 3e-5),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("optimizer.betas.0=0.8", "optimizer.betas", [0.8, 0.999]),
        ("data.sources.1.caption=x", "data.sources.1.caption", "x"),
        ("data.sources.1.caption='a cat: asleep #1'", "data.sources.1.caption", "a cat: asleep #1"),
        ("data.sources.1.caption=", "data.sources.1.caption", None),
        ("data.sources.0.caption=no", "data.sources.0.caption", "no"),
        ("preview.prompts=[a, b=c]", "preview.prompts", ["a", "b=c"]),
        ("ema.decay=0.9", "ema.decay", 0.9),
        ("ema={decay: 0.9}", "ema.decay", 0.9),
        ("ema={}", "ema.decay", 0.99),
        ("ema=null", "ema", None),
        ("schedule.warmup_steps=5", "schedule.warmup_steps", 5),
        ("schedule.kind=cosine", "schedule.kind", "cosine"),
        ("train={batch_size: 3}", "train.steps", 1000),
    ],
)
def test_an_override_is_yaml(run: Path, override: str, key: str, value: object) -> None:
    found: object = load_config(run, [override]).config
    for step in key.split("."):
        found = found[int(step)] if isinstance(found, list) else getattr(found, step)
    assert found == value


def test_the_last_override_of_a_key_wins(run: Path) -> None:
    assert load_config(run, ["train.steps=5", "train.steps=6"]).config.train.steps == 6


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train.steps=abc", "'abc' is not an integer"),
        ("train.stpes=4", "unknown key; did you mean 'steps'?"),
        ("trian.steps=4", "trian: unknown key; did you mean 'train'?"),
        ("steps=4", "unknown key; did you mean 'train.steps'?"),
        ("ema={decay: 2}", "ema.decay: 2 is too large; must be below 1"),
        ("train.steps", "an override is key=value, such as train.steps=500"),
        ("=5", "an override is key=value, such as train.steps=500"),
        ("train..steps=5", "an override is key=value, such as train.steps=500"),
        ("train.steps.more=5", "train.steps is a single value (20) and has no keys"),
        ("train.batch_size.more=5", "train.batch_size is a single value (1) and has no keys"),
        (
            "data.sources.2.path=x",
            "data.sources has entries 0 to 1; give the list as a whole to make it longer",
        ),
        (
            "data.sources.path=x",
            "data.sources is a list; name an entry by its number, such as data.sources.0",
        ),
        (
            "preview.prompts.0=x",
            "preview.prompts is an empty list; give it as a whole, such as preview.prompts='[...]'",
        ),
        ("data.sources.0.caption=a: b: c", "a second ': ' in one value"),
        (
            "data.sources.0.caption=a: b",
            "{'a': 'b'} is not text; if it is one text with a colon, put it in quotes",
        ),
        (
            "data.sources.0.caption=dog #1",
            "YAML takes what follows '#' as a comment; put the value in quotes",
        ),
        ("ema={decay: 0.9, decay: 0.8}", "decay: duplicate key; it is already on line 1"),
        ("name=!!python/name:os.system x", "the tag !!python/name:os.system is not allowed"),
        ("flow.weighting.kind=minsnr", "'minsnr' is not one of: none, min_snr"),
        ("schedule.warmup_steps=20", "schedule.warmup_steps is 20 but train.steps is 20"),
    ],
)
def test_a_wrong_override_is_named(run: Path, override: str, problem: str) -> None:
    (found,) = problems(run, override)
    assert found.startswith(f"override {override}: {problem}")


def test_a_change_of_kind_drops_the_keys_that_only_the_former_variant_had(run: Path) -> None:
    loaded = load_config(run, ["flow.weighting.kind=none", "flow.timesteps.kind=uniform"])
    assert loaded.config.flow.weighting.kind == "none"
    assert loaded.config.flow.timesteps.kind == "uniform"
    assert loaded.notes == (
        "override flow.weighting.kind=none: dropped flow.weighting.gamma: 3.0, which kind none does not have",
        "override flow.timesteps.kind=uniform: dropped flow.timesteps.mean: 0.5, which kind uniform does not have",
    )


def test_a_change_of_kind_keeps_what_both_variants_have(run: Path) -> None:
    run.write_text(RUN + "schedule: {kind: constant, warmup_steps: 4}\n")
    loaded = load_config(run, ["schedule.kind=cosine"])
    assert loaded.config.schedule.warmup_steps == 4
    assert loaded.notes == ()


def test_a_change_of_kind_drops_a_value_that_means_something_else_there(run: Path) -> None:
    run.write_text(RUN + "optimizer: {kind: adamw, lr: 1e-4, weight_decay: 0.0}\n")
    loaded = load_config(run, ["optimizer.kind=prodigy"])
    assert (loaded.config.optimizer.lr, loaded.config.optimizer.weight_decay) == (1.0, 0.0)
    dropped = "override optimizer.kind=prodigy: dropped optimizer.lr: 0.0001"
    assert loaded.notes == (f"{dropped}, which kind prodigy has another default for: 1.0",)
    assert load_config(run, ["optimizer.kind=adamw8bit"]).config.optimizer.lr == 1e-4
    assert load_config(run, ["optimizer.kind=prodigy", "optimizer.lr=0.5"]).config.optimizer.lr == 0.5


def test_a_change_of_kind_drops_nothing_that_was_asked_for(run: Path) -> None:
    (found,) = problems(run, "flow.weighting.gamma=7", "flow.weighting.kind=none")
    assert found.startswith("override flow.weighting.gamma=7: unknown key with kind none")


def test_a_change_of_kind_hides_no_typing_error(run: Path) -> None:
    run.write_text(RUN.replace("gamma: 3.0", "gama: 3.0"))
    (found,) = problems(run, "flow.weighting.kind=none")
    assert found.startswith(f"{run}:7: flow.weighting.gama: unknown key")


def test_an_override_to_the_same_kind_keeps_its_keys(run: Path) -> None:
    loaded: LoadedConfig = load_config(run, ["flow.weighting.kind=min_snr"])
    assert loaded.config.flow.weighting.model_dump() == {"kind": "min_snr", "gamma": 3.0}
    assert loaded.notes == ()


def test_epochs_replace_the_steps_of_the_file_when_these_are_taken_out(run: Path) -> None:
    config = load_config(run, ["train.steps=null", "train.epochs=2"]).config
    assert (config.train.steps, config.train.epochs) == (None, 2)
    assert load_config(run, ["train={epochs: 2}"]).config.train.steps is None
    (found,) = problems(run, "train.epochs=2")
    assert "train.steps is 20 and train.epochs is 2: both" in found
