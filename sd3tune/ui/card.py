"""A model card as HTML: its Markdown without raw HTML, with pictures from its run only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import EnvType, OptionsDict

_SCHEMES = ("http", "https", "mailto")
_LONGEST = 2**20
"""Bytes of a card that are shown."""
_FENCE = "---\n"


class _Renderer(RendererHTML):
    """Links open beside the page and tell the other site nothing. Pictures from elsewhere are shown as their text."""

    def image(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[index]
        inside = _inside(str(token.attrs.get("src", "")))
        text = self.renderInlineAsText(token.children, options, env) if token.children else ""
        if inside is None or not env["place"]:
            return f"<em>{_escaped(text or 'a picture on another site')}</em>"
        path = quote(f"{env['place']}/{inside}", safe="")
        return f'<img src="/api/picture?path={path}" alt="{_escaped(text)}" loading="lazy">'

    def link_open(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[index]
        if urlsplit(str(token.attrs.get("href", ""))).scheme not in _SCHEMES:
            token.attrs.pop("href", None)
        else:
            token.attrs.update(target="_blank", rel="noopener noreferrer")
        return self.renderToken(tokens, index, options, env)


def _inside(source: str) -> str | None:
    """Return the path of a picture below the card's folder; None for one elsewhere."""
    split = urlsplit(source)
    path = PurePosixPath(unquote(split.path))
    if split.scheme or split.netloc or path.is_absolute() or ".." in path.parts or not path.parts:
        return None
    return str(path)


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")


_MARKDOWN = MarkdownIt("commonmark", {"html": False}, renderer_cls=_Renderer).enable("table")


def read_card(file: Path) -> tuple[str, str]:
    """Return the YAML header and the Markdown of a card; empty for a file that cannot be read."""
    try:
        with file.open("rb") as opened:
            text = opened.read(_LONGEST).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return "", ""
    header, fence, rest = text.removeprefix(_FENCE).partition(f"\n{_FENCE}")
    return (header, rest) if fence and text.startswith(_FENCE) else ("", text)


def as_html(markdown: str, place: str) -> str:
    """Return the Markdown as HTML that holds no script, form or raw HTML; `place` is the folder of its pictures."""
    environment: dict[str, Any] = {"place": place}
    return str(_MARKDOWN.render(markdown, environment))
