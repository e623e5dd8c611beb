"""Draw a contact sheet of the world's subjects, and of its styles and pairs.

python -m examples.nano.show_world docs/images/nano_subjects.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sd3tune.nano.world import STYLES, SUBJECT, SUBJECTS, Scene, Thing, render
from sd3tune.sampling.contact_sheet import contact_sheet

SIDE = 88
_COLOURS = ("red", "white", "purple", "black", "orange", "blue", "yellow", "green", "white", "orange", "blue", "red")
_GROUNDS = ("white", "red", "black", "yellow", "blue", "orange", "purple", "white", "blue", "black", "yellow", "green")


def scenes() -> list[list[Scene]]:
    """Return two rows of subjects, a row of styles with two pairs."""
    singles = [
        Scene(ground, Thing(colour, subject))
        for colour, ground, subject in zip(_COLOURS, _GROUNDS, SUBJECTS[1:], strict=True)
    ]
    styles = [Scene("yellow", Thing("blue", SUBJECT), style=style) for style in STYLES[1:]]
    pairs = [
        Scene("white", Thing("red", "house"), relation="left of", other=Thing("green", "tree")),
        Scene("blue", Thing("yellow", "moon"), relation="above", other=Thing("white", "boat")),
    ]
    return [singles[:6], singles[6:], [*styles, *pairs]]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.show_world", description=__doc__)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    rows = scenes()
    images = [[render(scene, 1) for scene in row] for row in rows]
    labels = [[scene.style or " and ".join(thing.shape for thing in scene.things) for scene in row] for row in rows]
    contact_sheet(images, side=SIDE, cells=labels).save(options.picture, optimize=True)


if __name__ == "__main__":
    main()
