"""Door: the words of a command line, from the parsing on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from sd3tune.cli.main import run
from sd3tune.errors import UserError
from tests.fuzz import pictures
from tests.fuzz.door import try_door
from tests.fuzz.pieces import ODD, TEXTS

CONFIG = {
    "model": {"base": "tiny", "max_sequence_length": 16},
    "data": {"sources": [{"path": "photos", "caption": "a dog"}], "resolution": 64},
}
FILES = ("run.yaml", "photos", "photos/a.png", "empty", "a.safetensors", "nothing", "run", "file", ".")
TYPED = (
    st.sampled_from(FILES)
    | TEXTS
    | TEXTS.map(lambda text: f"photos/{text}")
    | st.sampled_from(["a@1", "a@nan", "a:b@c"])
)
NUMBERS = st.sampled_from(["1", "0", "-1", "16", "1e3", "nan", "inf", "9" * 30, "x", "", "1_000", "٣"])
VERBS = (
    ["config", "check", "FILE", "OVERRIDE"],
    ["config", "show", "FILE", "OVERRIDE"],
    ["config", "new", "TEXT", "--from", "TEXT", "--out", "new.yaml"],
    ["config", "new", "TEXT", "--data", "FILE", "--caption", "TEXT", "--out", "new.yaml"],
    ["data", "check", "photos", "--sheet", "sheet.png", "--caption", "TEXT"],
    ["config", "check", "run.yaml"],
    ["config", "show", "run.yaml", "OVERRIDE"],
    ["data", "check", "FILE", "--sheet", "sheet.png", "--caption", "TEXT"],
    ["data", "check", "run.yaml", "OVERRIDE", "--sheet", "sheet.png"],
    ["data", "convert", "FILE", "--to", "FORM", "--out", "out"],
    ["data", "caption", "FILE", "--trigger", "TEXT", "--subject", "TEXT", "--model", "FILE", "--dry-run"],
    ["data", "mask", "FILE", "--prompt", "TEXT", "--threshold", "NUMBER", "--sheet", "FILE", "--dry-run"],
    ["lora", "inspect", "FILE"],
    ["lora", "verify", "FILE"],
    ["lora", "convert", "FILE", "--to", "FORM", "--out", "out"],
    ["lora", "resize", "FILE", "--rank", "NUMBER", "--out", "out"],
    ["lora", "merge", "FILE", "FILE", "--out", "out"],
    ["hub", "push", "FILE", "--repo-id", "TEXT"],
    ["cache", "ls", "FILE"],
    ["cache", "prune", "FILE", "--older-than", "NUMBER"],
    ["plan", "FILE", "--card", "TEXT", "--memory", "NUMBER"],
    ["base", "path", "TEXT"],
    ["infer", "--lora", "FILE", "--prompt", "TEXT", "--out", "file/x"],
    ["infer", "--base", "FILE", "--prompt", "TEXT", "--out", "file/x"],
    ["infer", "--base", "tiny", "--prompt", "TEXT", "--FLAG", "NUMBER", "--out", "file/x"],
    ["infer", "--base", "tiny", "--prompt", "TEXT", "--FLAG", "TEXT", "--out", "file/x"],
    ["infer", "--base", "tiny", "--prompt", "a", "--grid", "AXIS", "--out", "file/x"],
    ["infer", "--base", "tiny", "--prompts", "FILE", "--out", "file/x"],
    ["infer", "--from", "FILE", "--look-in", "FILE", "--out", "file/x"],
    ["TEXT", "TEXT"],
)
FLAGS = (
    *(
        "negative",
        "seed",
        "steps",
        "guidance",
        "size",
        "batch",
        "sampler",
        "shift",
        "noise-offset",
        "slg",
        "slg-layers",
    ),
    *(
        "slg-start",
        "slg-stop",
        "image",
        "mask",
        "strength",
        "num",
        "t5-tokens",
        "dtype",
        "quantize",
        "prompt-t5",
        "revision",
    ),
)
"""Of `infer`."""
AXES = st.builds(
    "{}={}".format, st.sampled_from([*FLAGS, "lora", "prompt", "weight"]), NUMBERS | TEXTS | st.just("1,2,3")
)
FILLED = {
    "FILE": TYPED,
    "TEXT": TEXTS,
    "NUMBER": NUMBERS,
    "FORM": st.sampled_from(["sidecar", "jsonl", "csv", "parquet", "diffusers", "kohya", "comfyui", "x"]),
    "OVERRIDE": st.builds(
        "{}={}".format, st.sampled_from(["train.steps", "name", "data", "model.base", "x"]), ODD.map(json.dumps) | TEXTS
    ),
    "--FLAG": st.sampled_from(FLAGS).map("--{}".format),
    "AXIS": AXES,
}


def can_be_typed(word: str) -> bool:
    """Whether a process can be given this word: no NUL, and of halves of characters those that stand for bytes."""
    return "\0" not in word and not any("\ud800" <= one < "\udc80" or "\udcff" < one <= "\udfff" for one in word)


FOUND = (
    ["data", "check", "x" * 300, "--sheet", "sheet.png", "--caption", "a dog"],
    ["infer", "--lora", "x" * 300, "--prompt", "a", "--out", "file/x"],
    ["config", "new", "a dog", "--data", "", "--caption", "a dog", "--out", "new.yaml"],
    ["data", "check", "run.yaml", "model.base=[]", "--sheet", "sheet.png"],
    ["infer", "--base", "tiny", "--prompt", "a", "--num", "9" * 30, "--out", "file/x"],
)
"""What once ended otherwise than with 0 or 2."""


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    words = draw(st.sampled_from(VERBS))
    return [draw(FILLED[word].filter(can_be_typed)) if word in FILLED else word for word in words]


def test_what_is_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(json.dumps(CONFIG))
    for folder in ("photos", "empty", "run"):
        Path(folder).mkdir()
    Path("photos/a.png").write_bytes(pictures.encoded("PNG", "RGB", (70, 64)))
    Path("run/run.json").write_text("{}")
    for file in ("a.safetensors", "file"):
        Path(file).write_bytes(b"\2\0\0\0\0\0\0\0{}")

    def call(words: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", ["sd3tune", *words])
        code = 0
        try:
            run()
        except SystemExit as stop:
            code = stop.code
        assert code in (None, 0, 2)
        if code == 2:
            raise UserError("a mistake")

    try_door("command line", command_lines(), call, tmp_path, known=FOUND)
