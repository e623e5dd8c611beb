"""Processes that are forked from one that has imported the libraries, and done nothing else, so no thread is lost."""

from __future__ import annotations

import multiprocessing

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.preloaded"])
