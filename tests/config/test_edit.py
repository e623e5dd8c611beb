"""One value of a YAML text is changed; everything else stays."""

from __future__ import annotations

import pytest

from sd3tune.config.edit import Raw, with_value
from sd3tune.config.presets import all_presets
from sd3tune.config.yaml12 import parse
from sd3tune.errors import ConfigError

TEXT = """\
# a header
name: rex   # the run

method:
  kind: lora
  rank: 16       # half: 8

train: {steps: 100}
ema: null
schedule:
preview:
  prompts:
    - a dog    # the first
  # the end of the preview
"""


@pytest.mark.parametrize(
    ("path", "value", "old", "new"),
    [
        (("method", "rank"), 8, "rank: 16       # half", "rank: 8        # half"),
        (("name",), "a: b", "name: rex   # the", "name: 'a: b'  # the"),
        (("train", "steps"), 20, "{steps: 100}", "{steps: 20}"),
        (("train", "batch_size"), 2, "{steps: 100}", "{steps: 100, batch_size: 2}"),
        (("optimizer", "lr"), Raw("1e-4"), None, "\n\noptimizer:\n  lr: 1e-4"),
        (("method", "alpha"), 4.0, "# half: 8\n", "# half: 8\n  alpha: 4.0\n"),
        (("ema", "decay"), 0.9, "ema: null", "ema: {decay: 0.9}"),
        (("ema",), {"decay": 0.9}, "ema: null", "ema: {decay: 0.9}"),
        (("schedule",), {"kind": "cosine"}, "schedule:\n", "schedule: {kind: cosine}\n"),
        (("schedule", "kind"), "cosine", "schedule:\n", "schedule: {kind: cosine}\n"),
        (
            ("method",),
            {"kind": "dora"},
            "method:\n  kind: lora\n  rank: 16       # half",
            "method: {kind: dora}       # half",
        ),
        (("preview", "prompts", 0), "a cat", "- a dog    # the", "- a cat    # the"),
        (("preview", "steps"), 4, "# the first\n", "# the first\n  steps: 4\n"),
        (("preview", "prompts"), ["a", "b # c"], "prompts:\n    - a dog    #", "prompts: [a, 'b # c']    #"),
    ],
)
def test_one_value_changes_and_comments_stay(path, value, old: str | None, new: str) -> None:
    edited = with_value(TEXT, path, value)
    if old is None:
        assert new in edited
        assert edited.startswith(TEXT[: TEXT.index("  # the end")])
    else:
        assert edited == TEXT.replace(old, new, 1)
    found = parse(edited).value
    for step in path:
        found = found[step]
    assert found == (float(value.text) if isinstance(value, Raw) else value)


@pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)
def test_every_value_of_a_preset_can_be_written_over_itself(preset) -> None:
    text = preset.path.read_text(encoding="utf-8")
    values = parse(text).value
    for section, inner in values.items():
        for key, value in inner.items() if isinstance(inner, dict) else ():
            assert parse(with_value(text, (section, key), value)).value == values
        assert parse(with_value(text, (section,), inner)).value == values
    assert parse(with_value(text, ("tracking", "tensorboard"), True)).value == {
        **values, "tracking": {**values.get("tracking", {}), "tensorboard": True},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "path", "value", "problem"),
    [
        ("a: [", ("name",), "x", "correct it first"),
        ("name: x", ("name", "y"), 1, "no section"),
        ("data: {sources: []}", ("data", "sources", 0, "path"), "x", "no such entry"),
        ("name: x", ("seed",), Raw("1\nb: 2"), "not a value"),
        ("name: x", ("seed",), Raw("[1"), "not a value"),
    ],
)
def test_what_cannot_be_changed_is_said(text: str, path, value, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        with_value(text, path, value)


def test_an_empty_text_begins_with_the_value() -> None:
    assert with_value("", ("train", "steps"), 3) == "train:\n  steps: 3\n"
