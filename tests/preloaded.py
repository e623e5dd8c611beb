"""What the server of tests/forks.py has ready for its children; nothing here computes, so that no thread is started."""

from __future__ import annotations

import gc

from PIL import Image

import sd3tune.cli.main
import sd3tune.commands.infer
import sd3tune.commands.train  # noqa: F401

Image.init()
gc.collect()
gc.freeze()  # a run collects after every component, and need not look at all this
