"""What only a browser shows: strangers and other sites, a thousand previews, two windows, a page that comes back."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.ui.chromium import chromium, needs_chromium, opened, served_here

WRITTEN = Path(__file__).parents[1] / "compat" / "written" / "lora"
COUNT = 1000
MOST_DECODED = 200
"""Pictures that may exist at once: those in the window, and some rows above and below it."""
STRANGER = "evil.example"
ATTACK = """\
<form id="form" method="post" action="{page}api/jobs/stop" enctype="text/plain"><input name='{{"id":"x"}}'></form>
<script>
  const ask = (path, method, mode) => fetch("{page}" + path, {{method, mode, credentials: "include"}});
  Promise.allSettled([ask("api/photos/folder", "POST", "no-cors"), ask("api/jobs/stop", "POST", "no-cors"),
                      ask("api/jobs", "GET", "cors")])
    .then((all) => (document.title = all.map((one) => one.status).join()));
</script>
"""

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium(f"--host-resolver-rules=MAP {STRANGER} 127.0.0.1") as started:
        yield started


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An opened folder with a finished run of two prompts."""
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path / "cache"))
    opened_on = tmp_path / "work"
    run = opened_on / "runs" / "rex"
    shutil.copytree(WRITTEN, run)
    (run / "config.yaml").write_text("preview: {prompts: [a <b>ball</b>]}\n")
    samples(run, 3)
    monkeypatch.chdir(opened_on)
    return opened_on


def samples(run: Path, count: int) -> None:
    (run / "samples").mkdir(exist_ok=True)
    Image.new("RGB", (32, 32), "grey").save(run / "samples" / "base-0.png")
    for number in range(count):
        colour = (number % 256, number * 7 % 256, number * 13 % 256)
        Image.new("RGB", (32, 32), colour).save(run / "samples" / f"step-{number * 10:06d}-0.png")


def watched(page: Page, folder: Path) -> None:
    page.goto(f"{page.url.partition('/new')[0]}/watch?run={folder / 'runs/rex'}")
    expect(page.locator("#run-state")).to_have_text("done")


def test_a_strangers_name_and_another_sites_posts_are_refused(browser: Browser, folder: Path, tmp_path: Path) -> None:
    with served_here(folder) as link:
        context, page, _ = opened(browser, link)
        origin = link.partition("?")[0]
        port = origin.rstrip("/").rpartition(":")[2]
        answer = context.new_page().goto(f"http://{STRANGER}:{port}/")
        assert answer is not None
        assert answer.status == 421  # although the name leads to this machine, as after DNS rebinding
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "index.html").write_text(ATTACK.format(page=origin))
        handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "site"))
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
            threading.Thread(target=site.serve_forever, daemon=True).start()
            for host in (STRANGER, "127.0.0.1"):  # another site, and the same one at another port
                other = context.new_page()
                other.goto(f"http://{host}:{site.server_port}/")
                expect(other).to_have_title("rejected,rejected,rejected")
                other.evaluate("document.getElementById('form').submit()")
                expect(other.locator("body")).to_contain_text("Another site may not change anything here.")
            site.shutdown()
        page.reload()
        expect(page.locator("h1")).to_have_text("New run")  # the user is still logged in
        assert not (folder / "photos").exists()


def test_of_a_thousand_previews_only_those_in_sight_are_decoded(browser: Browser, folder: Path) -> None:
    samples(folder / "runs/rex", COUNT)
    with served_here(folder) as link:
        context, page, errors = opened(browser, link)
        asked = list[str]()
        context.on("request", lambda request: asked.append(request.url) if "/small" in request.url else None)
        watched(page, folder)
        page.get_by_text("All previews").click()
        gallery = page.locator("#gallery")
        expect(gallery.locator("li")).to_have_count(COUNT + 1)
        expect(gallery.locator("img").first).to_have_js_property("naturalWidth", 32)
        first = gallery.locator("img").count()
        assert 0 < first < MOST_DECODED
        for part in (0.5, 1.0):
            page.evaluate(f"window.scrollTo(0, document.body.scrollHeight * {part})")
            page.wait_for_timeout(300)
            assert gallery.locator("img").count() < MOST_DECODED
        gallery.locator("li").last.scroll_into_view_if_needed()
        expect(gallery.locator("li").last.locator("img")).to_have_js_property("naturalWidth", 32)
        assert gallery.locator("img").count() < MOST_DECODED
        assert len(asked) < 3 * MOST_DECODED
        slider = page.get_by_label("Step of the previews")
        slider.focus()
        page.keyboard.press("Home")
        expect(page.locator("#at-step")).to_have_text("step 0")
        page.keyboard.press("ArrowRight")
        expect(page.locator("#at-step")).to_have_text("step 10")
        assert page.locator(".pair img").count() == 2
        assert errors == []


def test_two_windows_see_a_run_grow_and_do_not_disturb_each_other(browser: Browser, folder: Path) -> None:
    with served_here(folder) as link:
        context, first, errors = opened(browser, link)
        watched(first, folder)
        second = context.new_page()
        second.goto(first.url)
        expect(second.locator("#at-step")).to_have_text("step 20")
        first.get_by_label("Step of the previews").focus()
        first.keyboard.press("Home")
        with (folder / "runs/rex/metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 7, "loss": 1.0, "lr": 1e-3, "grad_norm": 1.0}) + "\n")
        samples(folder / "runs/rex", 4)
        for page in (first, second):
            expect(page.locator("#figures")).to_contain_text("7")
            expect(page.locator("#loss .u-legend")).to_be_visible()
        expect(second.locator("#at-step")).to_have_text("step 30")
        expect(first.locator("#at-step")).to_have_text("step 0")
        expect(first.locator(".pair figcaption")).to_have_text("a <b>ball</b>")
        assert errors == []


def test_an_open_page_comes_back_after_a_restart(browser: Browser, folder: Path) -> None:
    with served_here(folder) as link:
        _, page, _ = opened(browser, link)
        watched(page, folder)
    expect(page.locator("#notices")).to_contain_text("does not answer")
    port = int(link.partition("/?")[0].rpartition(":")[2])
    with served_here(folder, port):
        expect(page.locator("#notices")).to_contain_text("is back", timeout=15_000)
        page.reload()
        expect(page.locator("#run-state")).to_have_text("done")


def test_a_new_run_says_what_is_wrong_and_where_its_photos_are(browser: Browser, folder: Path) -> None:
    for name in ("red", "blue"):
        (folder / "sent").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), name).save(folder / "sent" / f"{name}.png")
    with served_here(folder) as link:
        _, page, errors = opened(browser, link)
        where, shown = page.get_by_label("Folder"), page.locator(".photo")
        where.fill("photos/new")
        page.locator("#pick").set_input_files([str(folder / "sent" / "red.png")])
        expect(shown).to_have_count(1)
        page.get_by_label("Base model").select_option("nano")
        expect(page.locator("#photos-summary")).to_have_text("1 photo, 1 to look at")  # small for others, not for nano
        page.get_by_label("Caption for photos without their own").fill("a sks shape")
        page.get_by_label("Name of the run").fill("dog")
        page.get_by_role("button", name="Create the configuration").click()
        start, form = page.get_by_role("button", name="Start training"), page.locator("#form")
        expect(start).to_be_enabled()
        form.get_by_label("train.steps").fill("-1")
        form.get_by_label("train.steps").blur()
        expect(start).to_be_disabled()
        expect(page.locator("#state")).to_contain_text("Correct the settings first")
        form.get_by_label("train.steps").fill("20")
        form.get_by_label("train.steps").blur()
        expect(start).to_be_enabled()
        form.get_by_label("preview.prompts").fill("a red sks shape\na shape, blue")
        form.get_by_label("preview.prompts").blur()
        expect(page.locator("#yaml")).to_have_value(re.compile(r"prompts: \[a red sks shape, 'a shape, blue'\]"))
        where.fill("")
        page.locator("#pick").set_input_files([str(folder / "sent" / "blue.png")])
        expect(where).to_have_value("photos/dog")
        page.get_by_role("button", name="Train on photos/dog").click()
        expect(page.locator("#use-photos")).to_be_empty()
        assert "path: ./photos/dog" in (folder / "dog.yaml").read_text()
        page.get_by_role("button", name="Remove blue.png").click()
        expect(page.locator("#notices")).to_contain_text("blue.png is now in photos/dog/.removed")
        expect(shown).to_have_count(0)
        assert errors == []
