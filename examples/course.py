"""Run the code of the course in docs/course, or write the course as notebooks.

python -m examples.course 1 2          # chapters 1 and 2; their pictures are written to runs/course
python -m examples.course --notebooks  # the whole course, to runs/course
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted((ROOT / "docs" / "course").glob("[0-9]*.md"))


def parts(chapter: Path) -> tuple[str, str, str]:
    """Return a chapter's text before its Python, the Python, and the text after it."""
    text = chapter.read_text(encoding="utf-8")
    before, code, after = re.split(r"^```python\n(.*?)^```\n", text, flags=re.DOTALL | re.MULTILINE)
    return before, code, after


def notebook(chapter: Path, folder: Path) -> NotebookNode:
    """Return a chapter as a notebook for a folder: it imports from this clone, and shows the picture it makes."""
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

    def text(markdown: str) -> NotebookNode:
        moved = re.sub(
            r"\]\((?![a-z]+:|#)([^)]+)\)",
            lambda link: f"]({os.path.relpath(chapter.parent / link[1], folder)})",
            re.sub(r"<img [^>]*>\n", "", markdown),
        )
        return new_markdown_cell(moved)

    before, code, after = parts(chapter)
    find = f"import sys\n\nsys.path.insert(0, {os.path.relpath(ROOT, folder)!r})  # the clone"
    show = f'from IPython.display import Image\n\nImage("{chapter.stem}.png", width=768)'
    return new_notebook(
        cells=[text(before), *(new_code_cell(cell.strip()) for cell in (find, code, show)), text(after)]
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.course", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chapters", nargs="*", type=int, metavar="CHAPTER", help="1 to 10; without any, all of them")
    parser.add_argument("--notebooks", action="store_true", help="write notebooks instead")
    parser.add_argument("--out", type=Path, default=Path("runs/course"), help="folder of what is written (runs/course)")
    asked = parser.parse_args()
    wrong = [number for number in asked.chapters if not 1 <= number <= len(CHAPTERS)]
    if wrong:
        parser.error(f"there is no chapter {wrong[0]}; choose from 1 to {len(CHAPTERS)}")
    folder = asked.out.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}; choose another folder")
    os.chdir(folder)
    for number in asked.chapters or range(1, len(CHAPTERS) + 1):
        chapter = CHAPTERS[number - 1]
        if asked.notebooks:
            import nbformat

            nbformat.write(notebook(chapter, folder), f"{chapter.stem}.ipynb")
        else:
            try:
                exec(compile(parts(chapter)[1], chapter, "exec"), {"__name__": "__main__"})
            except FileNotFoundError as error:
                parser.error(f"chapter {number}: {error}; run the chapters before it first")
        print(folder / f"{chapter.stem}.{'ipynb' if asked.notebooks else 'png'}")


if __name__ == "__main__":
    main()
