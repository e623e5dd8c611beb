"""A browser draws the page: curves, slider, both colour schemes, and a phone's width; it asks for nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sd3tune.html_report.page import comparison_page, report_page
from sd3tune.html_report.read import read_run

PHONE, DESKTOP = (360, 740), (1280, 900)


@pytest.fixture(scope="module")
def pages(drawn_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a report and of a comparison."""
    folder, run = tmp_path_factory.mktemp("pages"), read_run(drawn_run)
    written = {"report": report_page(run), "comparison": comparison_page([run, run], ["one", "a/longer name of two"])}
    for name, html in written.items():
        (folder / f"{name}.html").write_text(html, encoding="utf-8")
    return {name: folder / f"{name}.html" for name in written}


def opened(chromium: Any, file: Path, size: tuple[int, int], scheme: str = "light") -> tuple[Any, list[str]]:
    """The page in a window, and a list to which its complaints and requests are added."""
    window = chromium.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    complaints: list[str] = []
    window.on("console", lambda message: complaints.append(message.text))
    window.on("pageerror", lambda error: complaints.append(str(error)))
    address = file.as_uri()
    window.on(
        "request", lambda asked: None if asked.url.startswith(("data:", address)) else complaints.append(asked.url)
    )
    window.goto(address)
    return window, complaints


def test_curves_have_values_and_the_slider_changes_the_pictures(chromium: Any, pages: dict[str, Path]) -> None:
    window, complaints = opened(chromium, pages["report"], DESKTOP)
    charts = window.locator(".chart")
    assert window.locator(".chart canvas").count() == charts.count() >= 5
    plot = charts.first.locator(".u-over")
    plot.scroll_into_view_if_needed()
    plot.hover(position={"x": 3, "y": 20})
    assert charts.first.locator(".u-legend .u-value").first.inner_text() == "1"  # step
    assert float(charts.first.locator(".u-legend .u-value").nth(1).inner_text()) > 0

    def pictures() -> list[str]:
        visible = window.locator(".over-time [data-step]:not([hidden])")
        return [visible.nth(number).get_attribute("data-step") for number in range(visible.count())]

    assert pictures() == ["2", "2"]
    window.locator("#step").focus()
    window.keyboard.press("ArrowLeft")
    assert pictures() == ["1", "1"]
    assert window.locator("output[for=step]").inner_text() == window.locator(".shown-step").first.inner_text() == "1"
    assert complaints == []
    window.close()


@pytest.mark.parametrize("name", ["report", "comparison"])
def test_nothing_is_wider_than_a_phone_and_the_dark_page_is_dark(
    chromium: Any, pages: dict[str, Path], name: str
) -> None:
    window, complaints = opened(chromium, pages[name], PHONE, "dark")
    assert window.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 21, 23)"
    outside = window.evaluate(
        "[...document.querySelectorAll('body *')].filter(e => e.innerText && e.clientHeight && "
        "e.getBoundingClientRect().right > innerWidth && !e.closest('.scroll, pre')).map(e => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    window.emulate_media(color_scheme="light")
    assert window.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
    assert complaints == []
    window.close()
