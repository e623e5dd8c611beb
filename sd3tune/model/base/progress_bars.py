"""Progress bars of the libraries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Silence the libraries' bars for single files, which would disturb the bars of a run."""
    loggers = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in loggers:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in loggers:
            log.enable_progress_bar()
