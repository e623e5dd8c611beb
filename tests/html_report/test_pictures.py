"""Pictures in a page are small copies, and where the page is full the least telling ones are left out."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

from sd3tune.html_report.over_time import prompts_of
from sd3tune.html_report.pictures import Album, embedded, spread
from sd3tune.html_report.read import read_run


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_small_pictures_are_kept_as_they_are_and_large_ones_made_smaller() -> None:
    small = Image.effect_noise((64, 48), 80).convert("RGB")
    assert decoded(embedded(small, 512).uri).convert("RGB").tobytes() == small.tobytes()
    large = embedded(Image.new("RGBA", (2048, 1024), (200, 10, 10, 255)), 512)
    assert (large.width, large.height) == decoded(large.uri).size == (512, 256)
    assert large.uri.startswith("data:image/webp;base64,")
    assert len(large.uri) < 5000


def test_the_last_step_and_the_first_come_before_those_between() -> None:
    assert spread([0, 10, 20, 30, 40]) == [40, 0, 20, 10, 30]
    assert spread([0, 10]) == [10, 0]
    assert spread([]) == []


def test_a_full_album_leaves_out_middle_steps_and_says_so(drawn_run: Path) -> None:
    run = read_run(drawn_run)
    whole = Album()
    assert [list(prompt.after) for prompt in prompts_of(run, whole)] == [[0, 1, 2], [0, 1, 2]]
    assert whole.sentence() == ""
    tight = Album(limit=whole.used - 1)
    assert [list(prompt.after) for prompt in prompts_of(run, tight)] == [[0, 1, 2], [0, 2]]
    assert tight.used <= tight.limit
    assert tight.sentence().startswith("1 picture was left out: a page holds at most ")
