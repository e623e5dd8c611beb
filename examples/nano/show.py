"""Draw a contact sheet of nano's images for held-out captions.

python -m examples.nano.show docs/images/nano.png
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sd3tune.commands.demo import SAMPLER, T5_LENGTH
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.nano.tasks import plain_tasks, rich_tasks
from sd3tune.sampling.contact_sheet import contact_sheet

COLUMNS, SIDE = 6, 112


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.nano.show", description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--base", default="nano")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    tasks = plain_tasks(COLUMNS, True, options.seed) + rich_tasks(2 * COLUMNS, True, options.seed)
    pipeline = ImagePipeline(options.base, SAMPLER, t5_length=T5_LENGTH)
    images = pipeline.draw([(task.prompt, task.seed) for task in tasks])
    rows = range(0, len(tasks), COLUMNS)
    contact_sheet(
        [images[row : row + COLUMNS] for row in rows],
        side=SIDE,
        cells=[[task.prompt for task in tasks[row : row + COLUMNS]] for row in rows],
    ).save(options.picture)


if __name__ == "__main__":
    main()
