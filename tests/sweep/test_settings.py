"""The file of a sweep: what it means, and one line for each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sd3tune.errors import ConfigError
from sd3tune.sweep.settings import Sweep, read_sweep
from sd3tune.sweep.space import override
from sd3tune.sweep.trials import drawn_ahead

GOOD = """\
config: train.yaml
axes:
  optimizer.lr: {low: 1e-4, high: 1e-2, log: true}
  method.rank: [4, 16]
  data.flip: [true, false]
sampler: random
trials: 6
"""


def written(folder: Path, text: str) -> Path:
    (folder / "sweep.yaml").write_text(text)
    return folder / "sweep.yaml"


def test_the_example_of_the_page_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sweep.md").read_text("utf-8")
    settings = read_sweep(written(tmp_path, page.partition("```yaml\n")[2].partition("```")[0])).settings
    assert settings.count == 12
    listed = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert listed == list(Sweep.model_fields)


def test_a_grid_is_every_combination_in_order(tmp_path: Path) -> None:
    text = "config: c\naxes:\n  a.b: [1, null]\n  c.d: {low: 0.1, high: 0.3, step: 0.1}\n"
    file = read_sweep(written(tmp_path, text))
    assert file.settings.count == 6
    assert drawn_ahead(file, 99) == [
        (f"a.b={first}", f"c.d={second}") for first in ("1", "null") for second in ("0.1", "0.2", "0.3")
    ]


def test_random_values_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    file = read_sweep(written(tmp_path, GOOD))
    first = drawn_ahead(file, 6)
    assert drawn_ahead(file, 6) == first
    assert len(set(first)) == 6
    assert drawn_ahead(read_sweep(written(tmp_path, GOOD + "seed: 1\n")), 6) != first
    rates = [float(overrides[0].partition("=")[2]) for overrides in first]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)


@pytest.mark.parametrize("value", ["text: 'a'", "1.0", "true", "null", '"half"', "[1, 2]", "1.5e-05"])
def test_values_reach_the_training_as_they_are_written(tmp_path: Path, value: str) -> None:
    from sd3tune.config.yaml12 import parse

    file = read_sweep(written(tmp_path, f"config: c\naxes:\n  a.b:\n    - {value}\n"))
    ((text,),) = drawn_ahead(file, 1)
    assert parse(text.partition("=")[2]).value == file.settings.axes["a.b"][0]
    assert override("a", 2e-5) == "a=2e-05"


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("trials: 6", "trails: 6", "7: trails: unknown key; did you mean 'trials'?"),
        ("trials: 6", "", "6: sampler: random needs a number of trials, such as trials: 20"),
        ("trials: 6", "trials: 0", "7: trials: 0 is too small; at least 1"),
        ("config: train.yaml\n", "", "config: missing; for example `config: train.yaml`"),
        ("low: 1e-4", "low: 1", "3: axes.optimizer.lr.high: 0.01 is not above low, which is 1"),
        (
            "low: 1e-4",
            "low: 0",
            "3: axes.optimizer.lr.log: needs a low above 0, and no step; set log: false, or change",
        ),
        ("log: true", "logg: true", "3: axes.optimizer.lr.logg: unknown key; did you mean 'log'?"),
        ("[4, 16]", "[4, 4]", "4: axes.method.rank: lists a value twice; remove one of them"),
        ("[4, 16]", "[]", "4: axes.method.rank: is an empty list; give at least one value"),
        ("[4, 16]", "4", "4: axes.method.rank: is neither a list of values nor a range such as {low: 1e-5,"),
        ("method.rank", "output_dir", "4: axes.output_dir: each trial has its own already; remove it"),
        ("sampler: random", "sampler: grid", "3: axes.optimizer.lr: a grid needs a step, or a list of values"),
        ("sampler: random", "sampler: bayes", "6: sampler: 'bayes' is not one of: grid, random, tpe"),
        ("trials: 6", "trials: 6\nworkers: 2\ngpus: [0]", "9: gpus: has 1 for 2 workers; give each worker one"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as caught:
        read_sweep(written(tmp_path, GOOD.replace(old, new)))
    (line,) = caught.value.problems
    assert line.startswith(f"{tmp_path / 'sweep.yaml'}:{'' if problem[0].isdigit() else ' '}{problem}")


@pytest.mark.parametrize(("text", "problem"), [("", "a sweep consists of lines"), ("a: [", ":1: ")])
def test_what_is_no_sweep_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        read_sweep(written(tmp_path, text))
