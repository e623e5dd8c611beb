"""What is written works: every link leads somewhere, and every command is one that the command line takes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from sd3tune.cli.main import app
from sd3tune.config import load_config
from sd3tune.errors import ConfigError
from tests.install.newcomer import NEEDS_ACCOUNT_OR_WEIGHTS, commands, typed

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"),
     *(ROOT / "benchmarks").rglob("*.md")]
)  # fmt: skip
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PLACEHOLDERS = {"CONFIG", "C", "my.yaml", "rex.yaml", "face.yaml", "product.yaml"}
"""Names that stand for the reader's own file."""
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]  # click's, which some typer versions bring along


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def links(page: Path) -> Iterator[str]:
    """Targets of `[text](target)` and of images, code left aside."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"(?:\]\(|<img src=\")([^)\s\"]+)[)\"]", re.sub(r"`[^`\n]*`", "", text)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """GitHub's names of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    dead = []
    for target in links(page):
        place, _, anchor = target.partition("#")
        found = page.parent / place if place else page
        alive = any(found.iterdir()) if found.is_dir() else found.is_file()  # git keeps no empty folder
        if not alive or (anchor and anchor not in anchors(found)):
            dead.append(target)
    assert dead == []


def test_the_pages_link_enough_to_be_worth_checking() -> None:
    assert sum(len(list(links(page))) for page in PAGES) > 15


def code_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a page's code blocks; of a YAML file, the commands that stand alone in a comment."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if path.suffix == ".yaml":
            if re.match(r"# +sd3tune \w", line):
                yield number, line.lstrip("# ")
        elif line.startswith("```"):
            fenced = not fenced
        elif fenced:
            yield number, line.strip()


def commands_to_type(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Every `sd3tune ...` in code, as words. A comment, or an explanation two blanks to the right, is left aside."""
    for number, line in code_lines(path):
        if re.match(r"((python|accelerate launch) (-m )?)?sd3tune \w", line):
            told = re.split(r" {2,}(?=[a-z])| > ", line)[0]
            found = shlex.split(told, comments=True)
            yield number, found[found.index("sd3tune") + 1 :]


def commands_mentioned(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Every `sd3tune ...` in the text, as words; `a|b` is taken apart."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fenced ^= line.startswith("```")
        for text in [] if fenced else re.findall(r"`(?:[a-z ]+-m |accelerate launch )?sd3tune ([a-z][^`]*)`", line):
            one = text.replace("\\|", "|").split()
            choices = next((word for word in one if re.fullmatch(r"[a-z]+(\|[a-z]+)+", word)), "")
            for choice in choices.split("|"):
                yield number, [choice if word == choices else word for word in one]


def gathered(find: Callable[[Path], Iterator[tuple[int, list[str]]]]) -> list[Any]:
    return [
        pytest.param(path, words, id=f"{name_of(path)}:{number} {' '.join(words[:2])}")
        for path in (*PAGES, *CONFIGS)
        for number, words in find(path)
    ]


TYPED, MENTIONED = gathered(commands_to_type), gathered(commands_mentioned)


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command of the command line that is meant, and its arguments."""
    command, rest = typer.main.get_command(app), list(words)
    while hasattr(command, "commands"):
        name = next(iter(rest), "")
        if name in command.commands or not hasattr(command, "fallback"):
            rest = rest[1:]
        else:
            name = command.fallback
        assert name in command.commands, f"there is no command {name!r}"
        command = command.commands[name]
    return command, rest


def options_of(command: Any) -> set[str]:
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


def check_typed(words: list[str]) -> None:
    """Parsed as the command line does, without running it; the configuration and the overrides are read."""
    command, rest = command_of(words)
    given = command.make_context(command.name, rest).params
    config = given.get("config")
    if config is not None and str(config) not in PLACEHOLDERS:
        load_config(ROOT / config, given.get("overrides") or ())


@pytest.mark.parametrize(("path", "words"), TYPED)
def test_every_command_to_type_is_taken(path: Path, words: list[str]) -> None:
    check_typed(words)


@pytest.mark.parametrize(("path", "words"), MENTIONED)
def test_every_command_that_is_mentioned_exists_with_its_options(path: Path, words: list[str]) -> None:
    command, rest = command_of(words)
    assert {word.strip("[]") for word in rest if re.match(r"\[?--", word)} <= options_of(command)


def test_there_are_commands_in_readme_docs_examples_and_configs() -> None:
    typed = {parameters.values[0] for parameters in TYPED}
    assert {ROOT / "README.md", ROOT / "docs" / "config.md", ROOT / "examples" / "dreambooth" / "README.md"} <= typed
    assert set(CONFIGS) <= typed
    mentioned = {parameters.values[1][0] for parameters in MENTIONED}
    assert mentioned >= {"demo", "train", "cache", "data", "infer", "config", "base"}


@pytest.mark.parametrize(
    "words",
    ["trein C", "train", "config chek C", "infer --lorra x --prompt P", "infer --lora", "infer --prompt",
     "train configs/nothing.yaml", "train configs/tiny_smoke.yaml train.stepz=2"],
)  # fmt: skip
def test_a_wrong_command_would_be_seen(words: str) -> None:
    with pytest.raises((AssertionError, ConfigError, USAGE_ERROR)):
        check_typed(words.split())


@pytest.mark.parametrize("path", [*PAGES, *CONFIGS], ids=name_of)
def test_every_config_and_script_that_is_mentioned_exists(path: Path) -> None:
    named = r"\b(?:configs|examples|sd3tune)/[\w./-]+\.(?:ya?ml|py)\b"
    mentioned = set(re.findall(named, path.read_text(encoding="utf-8")))
    assert {name for name in mentioned if not (ROOT / name).is_file()} == set()


def test_a_page_names_every_command_and_the_options_of_infer() -> None:
    page = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    commands = typer.main.get_command(app).commands
    assert [name for name in commands if f"`sd3tune {name}" not in page] == []
    assert {option for option in options_of(commands["infer"]) if option not in page} <= {
        "--dtype", "--before", "--no-before",
    }  # fmt: skip


README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_is_narrow_and_says_what_was_never_tried_before_anything_is_typed() -> None:
    assert [line for line in README.splitlines() if len(line) > 100] == []
    before = README.split("```")[0]
    assert "No run on real weights has been made yet, and nothing was measured on a GPU" in before
    assert "Windows and macOS are untested" in before


def test_every_page_of_docs_is_found_from_the_readme() -> None:
    assert {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")} <= set(links(ROOT / "README.md"))


def test_the_newcomer_types_the_whole_first_page_but_what_needs_an_account() -> None:
    on_the_page, lines = commands(README), typed(README)
    assert on_the_page[0] == "make setup && source .venv/bin/activate"
    assert [line.split()[1] for line in on_the_page[1:]] == [
        "demo", "infer", "config", "train", "auth", "train", "infer",
    ]  # fmt: skip
    assert len(lines) == len(on_the_page) - len(NEEDS_ACCOUNT_OR_WEIGHTS)
    assert set(lines) - set(on_the_page) == {lines[-1]}
    assert lines[-1].replace("runs/rehearsal", "runs/rex") == on_the_page[-1]


def test_make_has_the_targets_that_are_written_about() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    typed = {line.split()[1] for page in PAGES for _, line in code_lines(page) if line.startswith("make ")}
    mentioned = {name for page in PAGES for name in re.findall(r"`make ([a-z-]+)`", page.read_text(encoding="utf-8"))}
    assert {"demo", "test", "check"} <= typed | mentioned
    assert typed | mentioned <= targets
