"""Many pictures, of which some may be there already: a call that was stopped goes on where it was."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from sd3tune.inference.album import Album
from sd3tune.inference.image_request import Shot
from sd3tune.inference.session import Studio, draw
from sd3tune.reporting import say


def draw_missing(studio: Studio, album: Album, shots: Sequence[Shot]) -> list[Path]:
    """Draw the shots of which the album holds no picture of that recipe, whatever its name, each once.

    Each is written when it is drawn, so that a stop costs the batch in hand. Returns the files in the shots' order.
    """
    started, files = time.monotonic(), album.found()
    missing = {album.key(shot): shot for shot in shots if album.key(shot) not in files}
    wanted = len({album.key(shot) for shot in shots})
    if missing:
        for shot, image in draw(studio, list(missing.values())):
            files[album.key(shot)] = album.add(shot, image)
    seconds = time.monotonic() - started
    each = f", {seconds / len(missing):.1f} s each" if missing else ""
    say(f"{len(missing)} drawn in {seconds:.0f} s{each}; {wanted - len(missing)} were there; all in {album.folder}")
    if wanted < len(shots):
        say(f"note: {len(shots) - wanted} of the {len(shots)} ask for what another one asks for")
    return [files[album.key(shot)] for shot in shots]
