"""The guides: every key that they name exists, their YAML is accepted, and their figures are those of the plan."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sd3tune.config import load_config, parse_config
from tests.test_docs import ROOT

GUIDES = ROOT / "docs" / "guides"
TRAINERS = GUIDES / "other-trainers.md"
SECTIONS = ("checkpoint", "data", "ema", "eval", "flow", "hub", "method", "model", "optimizer", "preview", "schedule",
            "tracking", "train", "validation")  # fmt: skip


def reference() -> set[str]:
    """The keys and sections of docs/config.md, which is written from the schema, such as `data.sources[].path`."""
    found, section = set[str](), ""
    for line in (ROOT / "docs" / "config.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#{2,3} (\S+?)(?:, kind .*)?$", line):
            section = heading[1]
            found.add(section)
        elif key := re.match(r"\| `(\w+)` \|", line):
            found.add(f"{section}.{key[1]}")
    return found


def our_side() -> Iterator[tuple[str, str]]:
    """Key and value, or an empty one, of each `key` and `key: value` in the right columns of the tables."""
    for line in TRAINERS.read_text(encoding="utf-8").splitlines():
        cells = re.split(r"(?<!\\)\|", line)
        if len(cells) == 4:
            for code in re.findall(r"`([^`]+)`", cells[2]):
                key, _, value = code.partition(": ")
                if re.match(rf"({'|'.join(SECTIONS)})([.\[]|$)", key):
                    yield key, value


NAMED = sorted(set(our_side()))
WITH_VALUES = [pair for pair in NAMED if pair[1]]


def test_the_tables_name_many_keys_and_none_that_does_not_exist() -> None:
    known = reference()
    assert len({key for key, _ in NAMED}) > 60
    assert {key for key, _ in NAMED} - known == set()


@pytest.mark.parametrize(("key", "value"), WITH_VALUES, ids=map(": ".join, WITH_VALUES))
def test_the_tables_give_values_that_the_key_takes(key: str, value: str, tmp_path: Path) -> None:
    source = {"path": str(tmp_path), "prior": {"prompt": "a dog"}} if "prior" in key else {"path": str(tmp_path)}
    kind = "dataset" if value == "dataset" else "folder"
    values = {"data": {"sources": [{"kind": kind, **source}]}, "hub": {"repo_id": "user/rex"}}
    parse_config(values, [f"{key.replace('[]', '.0')}={value}"])


def yaml_blocks() -> Iterator[object]:
    for page in sorted(GUIDES.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        for number, block in enumerate(re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)):
            yield pytest.param(block, id=f"{page.stem}-{number}")


@pytest.mark.parametrize("block", yaml_blocks())
def test_the_yaml_of_a_guide_is_accepted(block: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(block, encoding="utf-8")
    config = load_config(file).config
    assert config.data.sources
    assert set(yaml.safe_load(block)) - {"extends"} <= {*SECTIONS, "name"}


def test_the_figures_of_the_comparison_are_those_of_the_benchmarks() -> None:
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    table = text.split("<!-- peer -->")[1].split("<!-- end of peer -->")[0]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    header, measured = cells[0], [row for row in cells[2:] if row]
    real = [row for row in measured if row[0].startswith("real-encoders")]
    small = [row for row in measured if row not in real]

    def ends(rows: list[list[str]], column: str) -> tuple[str, str]:
        found = sorted((row[header.index(column)] for row in rows), key=float)
        return found[0], found[-1]

    page = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| ([^|]+) \| ([\d.]+ \| [\d.]+) \|$", page, flags=re.MULTILINE))
    assert {what: tuple(figures.split(" | ")) for what, figures in told.items()} == {
        "images per second, small models": ends(small, "images/s"),
        "images per second, text encoders and VAE of real size": ends(real, "images/s"),
        "peak memory": ends(measured, "peak memory"),
        "time of a whole run": ends(measured, "wall time"),
        "time to the first step, nothing encoded": ends(measured, "first step"),
    }
    step = r"\| sd35-medium \| 1024 \| none \| (\w+) \|(?:[^|]+\|){4} ([\d.]+) \|"
    counted = dict(re.findall(step, text))
    assert f"{counted['sd3tune']} GB, and the example's {counted['example']} GB" in " ".join(page.split())


def rows() -> list[list[str]]:
    """Card, configuration, and the two figures in GB of the table in cards.md."""
    text = (GUIDES / "cards.md").read_text(encoding="utf-8")
    return re.findall(r"^\| [^|]+ \| `(\w+)` \| `(\w+)` \| ([\d.]+) GB \| ([\d.]+) GB \|$", text, flags=re.MULTILINE)


def test_every_preset_for_a_card_is_in_the_table() -> None:
    presets = {path.stem for path in (ROOT / "configs").glob("sd35_*.yaml")} - {"sd35_medium_style"}
    assert {name for _, name, *_ in rows()} == presets


@pytest.mark.long  # two seconds a row
def test_the_figures_for_each_card_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    from sd3tune.commands.plan import make_run_plan

    monkeypatch.setattr("sd3tune.commands.plan.knobs", lambda inputs: [])  # each is another rehearsal
    for card, name, needed, training in rows():
        plan = make_run_plan(load_config(ROOT / "configs" / f"{name}.yaml").config, card, None, 40)
        peak = next(phase["peak"] for phase in plan.phases if phase["phase"] == "train")
        assert (name, f"{plan.needed / 1e9:.1f}", f"{int(peak) / 1e9:.1f}", plan.fits) == (name, needed, training, True)
