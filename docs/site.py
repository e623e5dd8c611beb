"""Hooks of mkdocs: the site has the README, the examples and linked source files, too, and references from the code.

On GitHub, a page links to whatever is in the repository: a folder, a source file, the README. Here each page keeps its
path in the repository, so such a link holds. A link to a folder leads to its README, one to a source file to a page
that shows the file. No address of a repository is needed.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from markdown import Markdown
from markdown.extensions import Extension
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from typer.cli import get_docs_for_click
from typer.main import get_command

import sd3tune
from sd3tune.cli.main import app

ROOT = Path(__file__).parents[1]
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md", "benchmarks/**/*.md")
AS_THEY_ARE = (".md", ".png", ".jpg")
CODE = re.compile(r"(^ *```.*?^ *```$)", flags=re.DOTALL | re.MULTILINE)
INDENTED_CODE = re.compile(r"(?<=\n\n)(?: {4}.*\n)+")
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)[^)\s#]+")
PICTURE = re.compile(r'<img src="([^"]+)" width="(\d+)" alt="([^"]*)">')
LANGUAGES = {".py": "python", ".yaml": "yaml", ".json": "json"}
REPORTING = ("using", "current", "Reporter", "JsonReporter", "NotebookReporter")
"""The public names of `sd3tune.reporting`, as docs/python.md lists them."""


class AsOnGitHub(Extension):
    """Lists nest by two spaces, as in CommonMark. It must be the first extension, as it makes the parser anew."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.tab_length = 2
        md.build_parser()


def on_config(config: MkDocsConfig) -> None:
    extensions: list[Any] = config.markdown_extensions
    extensions.insert(0, AsOnGitHub())


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Replace the files of docs/ by the pages of the repository, and all files that these link to."""

    def add(path: str, **options: Any) -> None:
        file = File.generated(config, path, **options)
        file.dest_uri = file.dest_uri.removeprefix("docs/")
        files.append(file)

    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    waiting = {str(page.relative_to(ROOT)) for pattern in PAGES for page in ROOT.glob(pattern)}
    done = set[str]()
    while waiting:
        path = waiting.pop()
        done.add(path)
        if path.endswith(".md"):
            text, linked = page(path)
            waiting |= linked - done
            add(path, content=text)
        elif path.endswith(AS_THEY_ARE):
            add(path, abs_src_path=str(ROOT / path))
        else:
            add(f"{path}.md", content=source(path), inclusion=InclusionLevel.NOT_IN_NAV)
    add("docs/reference/cli.md", content=command_line())
    add("docs/reference/api.md", content=python_api())


def page(path: str) -> tuple[str, set[str]]:
    """Return the Markdown of a page for the site, and the paths of the files that it links to."""
    linked = set[str]()

    def link(found: re.Match[str]) -> str:
        file = (ROOT / path).parent.joinpath(found[0]).resolve()
        readme = "/README.md" if (file / "README.md").is_file() else ""
        linked.add(str(file.relative_to(ROOT)) + readme)
        return found[0].rstrip("/") + (readme or ("" if file.suffix in AS_THEY_ARE else ".md"))

    def picture(found: re.Match[str]) -> str:
        address, width, alternative = found.groups()
        return f'![{" ".join(alternative.split())}]({address}){{ width="{width}" }}'

    def fence(found: re.Match[str]) -> str:
        return f"```\n{textwrap.dedent(found[0])}```\n"

    parts = CODE.split((ROOT / path).read_text(encoding="utf-8"))
    for number in range(0, len(parts), 2):  # between them is code
        prose = INDENTED_CODE.sub(fence, LINK.sub(link, PICTURE.sub(picture, parts[number])))
        parts[number] = prose.replace("<details>", '<details markdown="1">')
    return "".join(parts), linked


def source(path: str) -> str:
    """Return a page that shows a source file, or lists a folder."""
    file = ROOT / path
    names = sorted(one.name for one in file.iterdir()) if file.is_dir() else None
    text = "\n".join(names) if names else file.read_text(encoding="utf-8").rstrip()
    language = LANGUAGES.get(file.suffix, "text")
    return f"---\nsearch: {{exclude: true}}\n---\n# {path}\n\n``````{language}\n{text}\n``````\n"


def command_line() -> str:
    """Return the help of all commands, as typer prints it; the list of commands is that of the headings."""
    command = get_command(app)
    context = command.make_context("sd3tune", [], resilient_parsing=True)
    text = get_docs_for_click(obj=command, ctx=context, name="sd3tune", title="Command line")
    return re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", text)


def python_api() -> str:
    """Return a page on which mkdocstrings puts the docstrings of all public names."""
    public = [name for name in sd3tune.__all__ if name not in ("__version__", "lora", "reporting")]
    errors = [name for name in public if sd3tune._MODULE_OF[name] == "sd3tune.errors"]
    functions = [name for name in public if name.islower()]
    sections = {
        "Functions": functions,
        "Classes": [name for name in public if name not in {*functions, *errors}],
        "Adapters": [f"lora.{name}" for name in sd3tune.lora.__all__],
        "Messages": [f"reporting.{name}" for name in REPORTING],
        "Errors": errors,
    }
    text = "# Python API\n\nAll public names. [Python](../python.md) shows how they are used.\n"
    for title, names in sections.items():
        text += f"\n## {title}\n\n" + "\n".join(f"::: sd3tune.{name}\n" for name in names)
    return text
