"""The frame of every page: a template with its styles and scripts inside, which loads nothing. It imports no torch."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

import sd3tune
from sd3tune.html_report.privacy import without_secrets

WEB = Path(sd3tune.__file__).parent / "assets" / "web"
SCRIPTS = ("uPlot.iife.min.js", "report.js")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_STYLES = ("uPlot.min.css", "theme.css", "report.css")


def rendered(
    template: str, texts: Mapping[str, Any], pictures: Mapping[str, Any], scripts: Sequence[str] = SCRIPTS
) -> str:
    """Fill a template. Secrets are taken out of `texts`, and of the names and captions beside `pictures`."""
    environment = Environment(loader=FileSystemLoader(WEB), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"clean": without_secrets, "markdown": _html}
    loaded = [_asset(name) for name in scripts]
    hashes = " ".join(f"'sha256-{_digest(script)}'" for script in loaded)
    return environment.get_template(template).render(
        **without_secrets(dict(texts)),
        **pictures,
        policy=f"{_POLICY}; script-src {hashes}",
        styles=[_asset(name) for name in _STYLES],
        scripts=loaded,
        version=sd3tune.__version__,
    )


def _asset(name: str) -> Markup:
    return Markup((WEB / name).read_text("utf-8"))


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _html(markdown: str) -> Markup:
    """Return the HTML of Markdown that may quote anything: raw HTML is escaped, and pictures are not loaded."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    return Markup(
        parser.render(markdown).replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    )
