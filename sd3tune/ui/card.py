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

from sd3tune.config import yaml12

_SCHEMES = ("http", "https", "mailto")
_LONGEST = 2**20
"""Bytes of a card that are shown."""
_FENCE = "---\n"
_GALLERY = "<p>&lt;Gallery /&gt;</p>"
"""How the Hub's own element is rendered here."""


class _Renderer(RendererHTML):
    """Links open beside the page and tell the other site nothing. Pictures from elsewhere are shown as their text."""

    def image(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[index]
        text = self.renderInlineAsText(token.children, options, env) if token.children else ""
        return _image(str(token.attrs.get("src", "")), text, env["place"])

    def link_open(self, tokens: Sequence[Token], index: int, options: OptionsDict, env: EnvType) -> str:
        token = tokens[index]
        href = str(token.attrs.pop("href", ""))
        shown = href if urlsplit(href).scheme in _SCHEMES else _address(href, env["place"])
        if shown is not None:
            token.attrs.update(href=shown, target="_blank", rel="noopener noreferrer")
        return self.renderToken(tokens, index, options, env)


def _image(source: str, text: str, place: str) -> str:
    address = _address(source, place)
    if address is None:
        return f"<em>{_escaped(text or 'a picture elsewhere')}</em>"
    return f'<img src="{_escaped(address)}" alt="{_escaped(text)}" loading="lazy">'


def _address(source: str, place: str) -> str | None:
    """Return the page's address of a PNG below the card's folder; None for anything else."""
    try:
        split = urlsplit(source)
    except ValueError:
        return None
    path = PurePosixPath(unquote(split.path))
    if split.scheme or split.netloc or path.is_absolute() or ".." in path.parts or path.suffix != ".png" or not place:
        return None
    return f"/api/picture?path={quote(f'{place}/{path}', safe='')}"


def _gallery(header: str, place: str) -> str:
    """Return the pictures that the Hub shows in place of `<Gallery />`: those of the header's `widget`."""
    try:
        widget = yaml12.parse(header).value["widget"]
        shown = [(str(one["output"]["url"]), str(one["text"])) for one in widget]
    except (yaml12.YamlError, LookupError, TypeError):
        return ""
    figures = (
        f"<figure>{_image(url, text, place)}<figcaption>{_escaped(text)}</figcaption></figure>" for url, text in shown
    )
    return f'<div class="widget">{"".join(figures)}</div>'


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


def as_html(header: str, markdown: str, place: str) -> str:
    """Return a card as HTML that holds no script, form or raw HTML; `place` is the folder of its pictures."""
    environment: dict[str, Any] = {"place": place}
    return str(_MARKDOWN.render(markdown, environment)).replace(_GALLERY, _gallery(header, place))
