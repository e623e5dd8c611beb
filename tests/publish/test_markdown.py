"""Markdown that shows any text as it is: what a parser of it reads back."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from sd3tune.publish.card.markdown import code, fenced, table

TEXTS = st.one_of(st.text(max_size=30), st.text("`|\\ \n#-a", max_size=12))
PARSER = MarkdownIt().enable("table")


def shown(text: str) -> str:
    """What of a text can be shown on one line."""
    return " ".join("".join(c if c.isprintable() or c.isspace() else "\ufffd" for c in text).split()) or "(blank)"


def read(inline: object) -> str:
    return "".join(child.content for child in inline.children)  # type: ignore[attr-defined]


@given(TEXTS)
@example("`")
@example("a ``` b `")
def test_inline_code_shows_the_text_on_one_line(text: str) -> None:
    (_, inline, _) = PARSER.parse(f"before {code(text)} after")
    assert read(inline) == f"before {shown(text)} after"


@given(TEXTS, TEXTS)
@example("|", "\\")
@example("a\\|b", "`|")
def test_a_cell_ends_where_it_should(one: str, other: str) -> None:
    tokens = PARSER.parse(table(["name", "value"], [[code(one), code(other)], ["last", "row"]]))
    cells = [read(tokens[number + 1]) for number, token in enumerate(tokens) if token.type == "td_open"]
    assert cells == [shown(text).replace("\\|", "\\ |") for text in (one, other)] + ["last", "row"]


@given(TEXTS.filter(lambda text: "\r" not in text and "\0" not in text))
@example("```")
def test_a_block_holds_the_text(text: str) -> None:
    (block,) = PARSER.parse(fenced("python", text))
    assert (block.info, block.content) == ("python", f"{text}\n")
