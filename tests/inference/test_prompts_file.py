"""A file of prompts: what its lines mean, what is wrong with them, and that a call that was stopped goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sd3tune.commands.infer import run_infer
from sd3tune.errors import ConfigError
from sd3tune.inference import session
from sd3tune.inference.image_request import ImageRequest
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.prompts_file import COLUMNS, read_prompts
from tests.pictures import distance

Draw = Callable[..., list[Path]]
LINES = [
    {"prompt": "a red circle", "seed": 3},
    {"prompt": 'a "blue", square', "steps": 2, "guidance": 2.5, "negative": "a circle"},
    {"prompt": "a star", "size": "32x48", "name": "the star"},
]


def written(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_csv_and_json_lines_mean_the_same(tmp_path: Path) -> None:
    csv = tmp_path / "prompts.csv"
    csv.write_text(
        "prompt,seed,steps,guidance,negative,size,name\n"
        "a red circle,3,,,,,\n"
        '"a ""blue"", square",,2,2.5,a circle,,\n'
        "a star,,,,,32x48,the star\n"
    )
    rows = read_prompts(csv)
    assert [row.values for row in rows] == [
        row.values for row in read_prompts(written(tmp_path / "prompts.jsonl", LINES))
    ]
    assert rows[2].values == {"prompt": "a star", "size": (32, 48), "name": "the star"}
    assert [row.place for row in rows] == [f"{csv}:{number}" for number in (2, 3, 4)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_plain_text_is_a_prompt_a_line(tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "prompts.TXT"
    path.write_text('a red circle\r\n\n  # not this one\n  a star, #2: "blue" \n{une étoile}', encoding=encoding)
    rows = read_prompts(path)
    texts = ["a red circle", 'a star, #2: "blue"', "{une étoile}"]
    assert [row.values for row in rows] == [{"prompt": text} for text in texts]
    assert [row.place for row in rows] == [f"{path}:{number}" for number in (1, 4, 5)]


def test_every_column_is_a_field_of_an_image_request() -> None:
    assert set(COLUMNS) <= set(ImageRequest.__dataclass_fields__)


def test_a_text_may_go_on_over_several_lines_of_csv(tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text('prompt,steps\n"a red\ncircle",2\na star,0\n')
    with pytest.raises(ConfigError, match=rf"^{path}:4: steps 0: at least 1$"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "prompt,stepz\na,1\n", "p.csv:2: stepz: unknown column; did you mean 'steps'?"),
        ("p.jsonl", '{"prompt": "a"}\n\n{"text": "b"}\n', "p.jsonl:3: text: unknown column; the columns are prompt, "),
        ("p.jsonl", '{"prompt": "a", "steps": 1.5}\n', "p.jsonl:1: steps: 1.5 is not a whole number"),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n', "p.jsonl:1: seed: True is not a whole number"),
        ("p.csv", "prompt,guidance\na,much\n", "p.csv:2: guidance: 'much' is not a number"),
        ("p.csv", "prompt,size\na,big\n", "p.csv:2: size: 'big' is not a side such as 1024"),
        ("p.csv", "prompt,size\na,100\n", "p.csv:2: size 100x100: both sides must be multiples of 16"),
        ("p.csv", "prompt,sampler\na,ddim\n", "p.csv:2: sampler ddim: one of euler"),
        ("p.csv", "prompt,name\na,../b\n", "p.csv:2: name: '../b' is not a file's name"),
        ("p.csv", "prompt,seed\n,1\n", "p.csv:2: prompt: missing"),
        ("p.jsonl", '{"prompt": 3}\n', "p.jsonl:1: prompt: 3 is not a text"),
        ("p.csv", "prompt\na dog, a cat\n", "p.csv:2: more values than columns"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt\n', "p.jsonl:2: not JSON: "),
        ("p.jsonl", '["a"]\n', "p.jsonl:1: each line is an object"),
        ("p.csv", "prompt\n", "p.csv: holds no prompts"),
        ("p.md", "a dog\n", "p.md: neither a .txt, a .jsonl nor a .csv file"),
        ("p.txt", "\n# a dog\n", "p.txt: holds no prompts"),
        ("p.csv", b"prompt\nein H\xfcndchen\n", "p.csv:2: byte 0xfc is not UTF-8"),
        ("p.csv", "prompt\na dog\n".encode("utf-16-be"), "p.csv: looks like UTF-16; save it as UTF-8"),
        ("p.jsonl", '{"prompt": "a\\u0000 dog"}\n', "is not a text: it holds NUL characters"),
    ],
)
def test_a_mistake_names_file_and_line(name: str, content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        read_prompts(path)
    (line,) = caught.value.problems
    assert said in line


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--prompts .*none\.csv: cannot be read \(No such file or directory\)$"):
        read_prompts(tmp_path / "none.csv")


# Drawing.


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    def draw(**options: object) -> list[Path]:
        given = {"prompt": None, "out": tmp_path / "images", "base": "tiny", "steps": 1, "size": (32, 32), **options}
        return run_infer(InferenceJob.from_fields(loras=[], **given))

    return draw


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of every batch that is denoised."""
    genuine, seen = session.sample_latents, []

    def recording(*args, **options):
        seen.append(args[5])
        return genuine(*args, **options)

    monkeypatch.setattr(session, "sample_latents", recording)
    return seen


def test_each_line_is_drawn_as_it_would_be_alone(draw: Draw, tmp_path: Path) -> None:
    files = draw(prompts=written(tmp_path / "p.jsonl", LINES), seed=1)
    assert [file.name for file in files] == ["a-red-circle-seed3.png", "a-blue-square-seed1.png", "the star.png"]
    alone = [
        draw(prompt="a red circle", seed=3, out=tmp_path / "alone"),
        draw(prompt=LINES[1]["prompt"], steps=2, guidance=2.5, negative="a circle", seed=1, out=tmp_path / "alone"),
        draw(prompt="a star", size=(32, 48), seed=1, out=tmp_path / "alone"),
    ]
    assert [distance(file, other) for file, (other,) in zip(files, alone, strict=True)] == [0, 0, 0]


def test_what_is_there_is_not_drawn_again_and_a_name_proves_nothing(
    draw: Draw, calls: list, tmp_path: Path, capsys
) -> None:
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "a dog", "seed": seed, "name": f"{seed}"} for seed in range(4)])
    first, gone, renamed, other = draw(prompts=prompts)
    before = first.read_bytes()
    gone.unlink()
    renamed.rename(renamed.with_name("renamed.png"))
    shutil.copy(first, other)  # of the right name, and another picture
    calls.clear()
    again = draw(prompts=prompts)
    assert calls == [[1], [3]]
    assert [file.name for file in again] == ["0.png", "1.png", "renamed.png", "3-2.png"]
    assert first.read_bytes() == before == other.read_bytes()
    assert "2 drawn in " in capsys.readouterr().out
    calls.clear()
    draw(prompts=prompts, steps=2)
    assert len(calls) == 4, "of another recipe"
    calls.clear()
    assert draw(prompts=prompts) == again
    assert calls == []
    assert "0 drawn in 0 s; 4 were there; all in " in capsys.readouterr().out


def test_a_stop_costs_the_picture_in_hand(draw: Draw, calls: list, tmp_path: Path, monkeypatch) -> None:
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "a dog", "seed": seed} for seed in range(3)])
    genuine = session.to_image

    def stopped(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        return genuine(*args)

    monkeypatch.setattr(session, "to_image", stopped)
    with pytest.raises(KeyboardInterrupt):
        draw(prompts=prompts)
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["a-dog-seed0.png"]
    monkeypatch.setattr(session, "to_image", genuine)
    calls.clear()
    assert len(draw(prompts=prompts)) == 3
    assert calls == [[1], [2]]


def test_a_line_that_asks_for_what_another_asks_for_is_drawn_once(draw: Draw, calls: list, tmp_path: Path) -> None:
    files = draw(prompts=written(tmp_path / "p.jsonl", [{"prompt": "a dog"}, {"prompt": "a dog", "name": "again"}]))
    assert calls == [[0]]
    assert files[0] == files[1]


def test_a_batch_holds_what_is_alike_and_changes_rounding_alone(draw: Draw, calls: list, tmp_path: Path) -> None:
    lines = [{"prompt": "a dog"}, {"prompt": "a star", "seed": 5, "steps": 2}, {"prompt": "a red circle", "seed": 7}]
    prompts = written(tmp_path / "p.jsonl", lines)
    alone = draw(prompts=prompts, out=tmp_path / "alone")
    calls.clear()
    together = draw(prompts=prompts, batch=2)
    assert calls == [[0, 7], [5]]
    assert all(distance(file, other) <= 1 for file, other in zip(together, alone, strict=True))
    calls.clear()
    assert draw(prompts=prompts, batch=3) == together
    assert calls == [], "the size of the batch makes no other picture"


def test_a_line_beyond_what_the_base_can_draw_is_named(draw: Draw, tmp_path: Path) -> None:
    prompts = written(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "a", "size": 4096}])
    with pytest.raises(
        ConfigError, match=rf"^{prompts}:2: size 4096x4096: this base draws at most 1536 pixels a side$"
    ):
        draw(prompts=prompts)


def test_prompts_come_from_one_place(draw: Draw, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^--prompt: each line of --prompts has its own"):
        draw(prompts=tmp_path / "p.csv", prompt="a dog")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a \\ud800 dog"}', r"p.jsonl:1: prompt: holds half a character (\ud800)"),
        ('{"prompt": "a", "negative": "\\udce9"}', "p.jsonl:1: negative: holds half a character"),
        ('{"prompt": "a", "steps": 1000000000000}', "p.jsonl:1: steps 1000000000000: at most 10000"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "p.jsonl:1: seed: inf is not a whole number"),
        ('{"prompt": "a", "size": "' + "9" * 5000 + '"}', "p.jsonl:1: size: "),
        ('{"prompt": ' + "[" * 100_000, "p.jsonl:1: not JSON: it is nested too deeply"),
    ],
)
def test_a_line_that_is_made_to_harm_is_one_line(line: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(line + "\n")
    with pytest.raises(ConfigError) as caught:
        read_prompts(tmp_path / "p.jsonl")
    assert said in caught.value.problems[0]


def test_a_file_of_prompts_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.txt")
    (tmp_path / "q.txt").symlink_to("/dev/zero")
    for name, what in (("p.txt", "a named pipe"), ("q.txt", "a device")):
        with pytest.raises(ConfigError, match=rf"^--prompts .*{name}: is {what}, not a file"):
            read_prompts(tmp_path / name)
