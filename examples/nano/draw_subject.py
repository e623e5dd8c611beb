"""Draw the pictures that the demo trains on, with their caption files.

python examples/nano/draw_subject.py sd3tune/assets/heart
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sd3tune.nano.tasks import INSTANCES, subject_caption
from sd3tune.nano.world import render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for seed, scene in enumerate(INSTANCES):
        file = folder / f"{scene.thing.colour}-on-{scene.background}.png"
        render(scene, seed).save(file, optimize=True)
        file.with_suffix(".txt").write_text(subject_caption(scene) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
