"""The site of the documentation: it builds without a warning, every link in it leads somewhere, and search finds."""

from __future__ import annotations

import contextlib
import re
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import typer
from markdown_it import MarkdownIt

import sd3tune
from sd3tune.cli.main import app
from tests.test_docs import PAGES, ROOT, name_of, options_of

PATIENCE = 120_000
"""Milliseconds that the browser may take for anything, on a busy machine."""
TARGETS = re.compile(r'<(?:a|img|link|script)\b[^>]*?\b(?:href|src)="([^"]*)"')
COUNTED = ("li", "table", "tr", "pre", "h1", "h2", "h3", "h4", "br", "img", "details")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs-site` builds it: a warning, a page outside the navigation included, is an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")  # an announcement, read at import
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        folder = tmp_path_factory.mktemp("site")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    return folder


def built(page: Path) -> str:
    """Where a page of the repository is on the site."""
    place = page.relative_to(ROOT).with_suffix("")
    place = place.relative_to("docs") if place.parts[0] == "docs" else place
    folder = place.parent if place.name == "README" else place
    return str(folder / "index.html")


def article(site: Path, name: str) -> str:
    """What the page has beside navigation and footer."""
    return (site / name).read_text(encoding="utf-8").split("<article", 1)[1].split("</article>")[0]


def test_every_page_is_on_the_site(site: Path) -> None:
    assert [name_of(page) for page in PAGES if not (site / built(page)).is_file()] == []


def test_every_link_and_anchor_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {page: page.read_text(encoding="utf-8") for page in site.rglob("*.html") if page.name != "404.html"}
    names = {page: {*re.findall(r'\bid="([^"]+)"', text)} for page, text in pages.items()}
    dead = []
    for page, text in pages.items():
        for target in {unescape(found) for found in TARGETS.findall(text)}:
            place, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            found = (page.parent / unquote(place)).resolve() if place else page
            found = found / "index.html" if found.is_dir() else found
            if not found.is_file() or (anchor and unquote(anchor) not in names[found]):
                dead.append((str(page.relative_to(site)), target))
    assert dead == []


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    loads = re.compile(r'<(?:img|link|script|iframe)\b[^>]*?\b(?:href|src)="(?:https?:)?//')
    assert [page for page in site.rglob("*.html") if loads.search(page.read_text(encoding="utf-8"))] == []
    styles = [
        file for file in site.rglob("*.css") if re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", file.read_text())
    ]
    assert styles == []


class Tags(HTMLParser):
    """How often each tag is there, and how many lists are inside lists."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found, self.depth = Counter[str](), 0
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: object) -> None:
        if tag in COUNTED:
            self.found[tag] += 1
        if tag in ("ul", "ol"):
            self.found[f"list {self.depth}"] += 1
            self.depth += 1

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in ("ul", "ol")


def test_every_page_has_the_structure_that_it_has_on_github(site: Path) -> None:
    markdown = MarkdownIt("commonmark").enable("table")
    other = {}
    for page in PAGES:
        github = Tags(markdown.render(page.read_text(encoding="utf-8"))).found
        here = Tags(article(site, built(page))).found
        if here != github:
            other[name_of(page)] = {tag: (github[tag], here[tag]) for tag in github | here if github[tag] != here[tag]}
    assert other == {}


def test_the_reference_of_the_command_line_has_every_command_and_option(site: Path) -> None:
    text = article(site, "reference/cli/index.html")

    def check(command, name: str) -> None:
        assert f"<code>{name}</code>" in text or name == "sd3tune"
        visible = [param for param in command.params if not getattr(param, "hidden", False)]
        shown = {option for param in visible for option in param.opts if option.startswith("--")}
        assert {option for option in shown & options_of(command) if option not in text} == set()
        for inner, one in getattr(command, "commands", {}).items():
            if not one.hidden:
                check(one, f"{name} {inner}")

    check(typer.main.get_command(app), "sd3tune")


def test_the_reference_of_the_api_has_a_docstring_for_every_public_name(site: Path) -> None:
    text = article(site, "reference/api/index.html")
    names = [f"sd3tune.{name}" for name in sd3tune.__all__ if name not in ("__version__", "lora", "reporting")]
    names += [f"sd3tune.lora.{name}" for name in sd3tune.lora.__all__]
    parts = {name: re.search(rf'id="{re.escape(name)}".*?(?=<h[23] |\Z)', text, flags=re.DOTALL) for name in names}
    assert [name for name, part in parts.items() if part is None or "<p>" not in part[0]] == []


def test_the_landing_page_shows_the_picture_and_the_first_commands(site: Path) -> None:
    text = article(site, "index.html")
    picture = re.search(r'<img [^>]*src="([^"]+demo\.png)"', text)
    assert picture
    assert (site / picture[1]).is_file()
    assert "sd3tune demo" in text


def test_a_dead_anchor_ends_the_build(tmp_path: Path) -> None:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config
    from mkdocs.exceptions import Abort

    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[there](#nowhere)\n")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnot_in_nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    with pytest.raises(Abort, match="1 warnings in strict mode"):
        build(load_config(str(tmp_path / "mkdocs.yml"), plugins=["search"], hooks=[]))


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    """The site on a local server."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_reader_searches_and_turns_on_the_lights_without_a_request_to_another_host(
    address: str, chromium: Any
) -> None:
    from playwright.sync_api import expect

    expect.set_options(timeout=PATIENCE)
    with chromium.new_page(color_scheme="dark") as page:
        page.set_default_timeout(PATIENCE)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"{address}/")
        expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "slate")
        page.get_by_title("Light").click()
        expect(page.locator("body")).to_have_attribute("data-md-color-scheme", "default")
        box = page.get_by_role("textbox", name="Search")
        box.fill("gradient checkpointing")
        found = page.locator(".md-search-result__link").first
        for _ in range(PATIENCE // 2000):
            box.press("End")  # a key reads the box again, which was too early before the index was there
            with contextlib.suppress(AssertionError):
                expect(found).to_be_visible(timeout=2000)
                break
        expect(found).to_be_visible()
        found.click()
        expect(page.locator("article")).to_contain_text("checkpointing")
        assert page.url != f"{address}/"
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
