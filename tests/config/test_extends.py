"""`extends`: one file over another, key by key; what is reported names the file and line where it stands."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sd3tune.config import Config, dump_config, load_config, parse_config
from sd3tune.config.presets import find_preset
from sd3tune.errors import ConfigError

BASE = """\
name: base
data:
  sources:
    - {path: ./dog, caption: a dog}
    - {path: ./cat, caption: a cat}
flow:
  weighting: {kind: min_snr, gamma: 3.0}
train:
  steps: 20
  batch_size: 2
ema: {decay: 0.5}
"""


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)


def load(text: str, *overrides: str) -> Config:
    Path("run.yaml").write_text(text)
    return load_config("run.yaml", overrides).config


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def test_sections_are_merged_and_the_extending_file_wins() -> None:
    config = load("extends: base.yaml\nname: mine\ntrain: {steps: 30}\n")
    assert config.name == "mine"
    assert (config.train.steps, config.train.batch_size) == (30, 2)
    assert config.flow.weighting.model_dump() == {"kind": "min_snr", "gamma": 3.0}


def test_lists_and_null_replace() -> None:
    config = load("extends: base.yaml\nema: null\ndata: {sources: [{path: ./bird}]}\n")
    assert [source.path for source in config.data.sources] == [str(Path("bird").absolute())]
    assert config.data.sources[0].caption is None
    assert config.ema is None


def test_a_file_that_only_extends_is_the_other_file_but_for_its_folder() -> None:
    assert load("extends: base.yaml\n") == load_config("base.yaml").config


def test_overrides_come_last() -> None:
    assert load("extends: base.yaml\ntrain: {steps: 30}\n", "train.steps=40").train.steps == 40


def test_of_several_the_later_wins_with_what_it_extends() -> None:
    Path("grand.yaml").write_text("seed: 1\nname: grand\ntrain: {log_every: 3}\n")
    Path("other.yaml").write_text("extends: grand.yaml\nname: other\n")
    config = load("extends: [base.yaml, other.yaml]\n")
    assert (config.name, config.seed) == ("other", 1)
    assert (config.train.steps, config.train.log_every) == (20, 3)
    assert load("extends: [other.yaml, base.yaml]\n").name == "base"


def test_a_change_of_kind_drops_the_inherited_keys_and_says_so() -> None:
    Path("run.yaml").write_text("extends: base.yaml\nflow:\n  weighting: {kind: none}\n")
    loaded = load_config("run.yaml")
    assert loaded.config.flow.weighting.kind == "none"
    dropped = "dropped flow.weighting.gamma: 3.0, which kind none does not have"
    assert loaded.notes == (f"run.yaml:3: {dropped}",)


def test_a_change_of_kind_on_the_way_leaves_nothing_behind_for_the_next_file() -> None:
    Path("plain.yaml").write_text("extends: base.yaml\nflow: {weighting: {kind: none}}\n")
    config = load("extends: [base.yaml, plain.yaml]\nflow: {weighting: {kind: min_snr}}\n")
    assert config.flow.weighting.model_dump() == {"kind": "min_snr", "gamma": 5.0}


def test_a_change_of_kind_drops_nothing_that_the_file_itself_asks_for() -> None:
    (found,) = problems("extends: base.yaml\nflow:\n  weighting:\n    kind: none\n    gamma: 2.0\n")
    assert found.startswith("run.yaml:5: flow.weighting.gamma: unknown key with kind none")


def test_problems_name_the_file_and_line_where_they_stand_the_extended_file_first() -> None:
    Path("base.yaml").write_text(BASE + "preview:\n  stesp: 3\nname: twice\n")
    found = problems("extends: base.yaml\ntrain:\n  batch_size: none\nflwo: 1\n", "seed=-1")
    assert [problem.split(": ")[:2] for problem in found] == [
        ["base.yaml:13", "preview.stesp"],
        ["base.yaml:14", "name"],
        ["run.yaml:3", "train.batch_size"],
        ["run.yaml:4", "flwo"],
        ["override seed=-1", "-1 is too small; at least 0"],
    ]


def test_a_value_that_is_replaced_is_no_problem() -> None:
    Path("base.yaml").write_text(BASE.replace("steps: 20", "steps: many"))
    assert load("extends: base.yaml\ntrain: {steps: 5}\n").train.steps == 5


def test_paths_are_relative_to_the_file_in_which_they_stand(tmp_path: Path) -> None:
    Path("shared").mkdir()
    Path("shared/base.yaml").write_text(
        "model: {base: ./model}\ndata: {cache_dir: cache, sources: [{path: dog}]}\noutput_dir: out\n"
    )
    config = load("extends: shared/base.yaml\n")
    assert config.data.sources[0].path == str(tmp_path / "shared" / "dog")
    assert config.data.cache_dir == str(tmp_path / "shared" / "cache")
    assert config.model.base == str(tmp_path / "shared" / "model")
    assert config.output_dir == str(tmp_path / "shared" / "out")
    config = load("extends: ./shared/base.yaml\ndata: {cache_dir: cache}\n")
    assert config.data.cache_dir == str(tmp_path / "cache")
    assert config.data.sources[0].path == str(tmp_path / "shared" / "dog")
    Path("configs").mkdir()
    Path("configs/run.yaml").write_text("extends: ../shared/base.yaml\n")
    assert load_config("configs/run.yaml").config.data.sources[0].path == str(tmp_path / "shared" / "dog")


def test_a_preset_is_extended_by_name() -> None:
    expected = load_config(find_preset("sd35_medium_12gb"), ["data.sources=[{path: ./dog}]", "name=rex"]).config
    config = load("extends: preset:sd35_medium_12gb\nname: rex\ndata: {sources: [{path: ./dog}]}\n")
    assert config == expected


def test_the_dump_extends_nothing() -> None:
    dumped = dump_config(load("extends: base.yaml\n"))
    assert "extends:" not in dumped
    Path("elsewhere").mkdir()
    Path("elsewhere/config.yaml").write_text(dumped)
    assert load_config("elsewhere/config.yaml").config == load_config("run.yaml").config


def test_plain_values_extend_a_file_too(tmp_path: Path) -> None:
    config = parse_config({"extends": "base.yaml", "name": "mine"}, folder=tmp_path).config
    assert (config.name, config.train.steps) == ("mine", 20)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("extends: bsae.yaml", "run.yaml:1: extends: bsae.yaml does not exist; did you mean base.yaml"),
        ("name: x\nextends: [base.yaml,\n  no/base.yaml]", "run.yaml:3: extends: no/base.yaml does not exist; neither"),
        ("extends: .", "run.yaml:1: extends: . is a folder; name a YAML file in it, such as base.yaml"),
        ("extends: preset:sd35_medium_12", "run.yaml:1: extends: no preset is called 'sd35_medium_12'; did you mean '"),
        ("extends: 'preset:'", "run.yaml:1: extends: no preset is called ''"),
        ("extends: 5", "run.yaml:1: extends: 5 is neither a file"),
        ("extends: []", "run.yaml:1: extends: [] is neither a file"),
        ("extends:", "run.yaml:1: extends: null is neither a file"),
        ("extends: [base.yaml, 5]", "run.yaml:1: extends: ['base.yaml', 5] is neither a file"),
        (
            "extends: run.yaml",
            "run.yaml:1: extends: a circle: run.yaml extends run.yaml; remove one of these `extends`",
        ),
        ("extends: newer.yaml", "newer.yaml:1: config_version 2 is newer"),
        ("extends: empty.yaml", "empty.yaml: is empty"),
        ("extends: broken.yaml", "broken.yaml:2: a tab cannot"),
        ("extends: base.yaml\ntrain: {extends: base.yaml}", "run.yaml:2: train.extends: unknown key"),
        ("extend: base.yaml\ndata: {sources: [{path: a}]}", "run.yaml:1: extend: unknown key; did you mean 'extends'?"),
    ],
)
def test_what_cannot_be_extended_is_one_line(text: str, problem: str) -> None:
    Path("newer.yaml").write_text("config_version: 2\n")
    Path("empty.yaml").write_text("# nothing\n")
    Path("broken.yaml").write_text("a: 1\n\tb: 2\n")
    (found,) = problems(text + "\n")
    assert found.startswith(problem)


def test_a_circle_names_every_file_in_it() -> None:
    Path("b.yaml").write_text("name: b\nextends: c.yaml\n")
    Path("c.yaml").write_text("extends: ./b.yaml\n")
    (found,) = problems("extends: b.yaml\n")
    assert found.startswith("c.yaml:1: extends: a circle: b.yaml extends c.yaml extends b.yaml; remove one")


def test_two_files_may_extend_the_same_one() -> None:
    Path("a.yaml").write_text("extends: base.yaml\nseed: 1\n")
    Path("b.yaml").write_text("extends: base.yaml\nname: b\n")
    config = load("extends: [a.yaml, b.yaml]\n")
    assert (config.seed, config.name) == (1, "b")


def test_an_override_cannot_extend() -> None:
    (found,) = problems("extends: base.yaml\n", "extends=other.yaml")
    assert found == "override extends=other.yaml: `extends` is for files: write it into the YAML"


def test_what_a_section_of_two_files_lacks_is_reported_at_the_extending_one() -> None:
    Path("base.yaml").write_text("name: base\ndata: {resolution: 512}\n")
    (found,) = problems("extends: base.yaml\nseed: 1\ndata: {flip: true}\n")
    assert found.startswith("run.yaml:3: data.sources: missing")


def test_a_file_that_is_extended_twice_at_each_of_many_levels_is_read_once() -> None:
    for level in range(40):  # 2^40 readings otherwise
        Path(f"{level}.yaml").write_text(f"extends: [{level + 1}.yaml, {level + 1}.yaml]\nseed: {level}\n")
    Path("40.yaml").write_text(BASE)
    config = load("extends: [0.yaml, 1.yaml]\n")
    assert (config.seed, config.name, config.train.steps) == (1, "base", 20)


def test_a_problem_of_a_file_that_is_extended_twice_is_told_once() -> None:
    Path("odd.yaml").write_text("extends: base.yaml\nnmae: 1\nseed: 1\nseed: 2\n")
    Path("other.yaml").write_text("extends: odd.yaml\n")
    assert problems("extends: [odd.yaml, other.yaml, odd.yaml]\n") == (
        "odd.yaml:2: nmae: unknown key; did you mean 'name'?",
        "odd.yaml:4: seed: duplicate key; it is already on line 3",
    )


def test_a_base_that_is_extended_twice_is_the_same_both_times() -> None:
    Path("min_snr.yaml").write_text("flow: {weighting: {kind: sigma_sqrt}}\n")
    config = load("extends: [base.yaml, min_snr.yaml, base.yaml]\n")
    assert config.flow.weighting.model_dump() == {"kind": "min_snr", "gamma": 3.0}


def test_more_files_than_anybody_extends_are_refused() -> None:
    names = ", ".join(["base.yaml"] * 101)
    assert problems(f"extends: [{names}]\n") == (
        "run.yaml:1: extends: more than 100 files are extended, directly and indirectly",
    )
    assert load(f"extends: [{', '.join(['base.yaml'] * 100)}]\n").name == "base"


def test_of_very_many_problems_the_first_are_explained() -> None:
    found = problems("extends: base.yaml\n" + "".join(f"k{number}: 1\n" for number in range(3000)))
    assert len(found) == 101
    assert found[0].startswith("run.yaml:2: k0: unknown key")
    assert found[-1] == "run.yaml: has more than 100 problems; these are the first"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_a_pipe_that_a_file_extends_is_not_waited_for() -> None:
    os.mkfifo("pipe.yaml")
    assert problems("extends: pipe.yaml\n") == ("run.yaml:1: extends: pipe.yaml is a named pipe, not a file",)
