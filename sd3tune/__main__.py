"""`python -m sd3tune` and, from the repository root, `python sd3tune` (as `accelerate launch sd3tune` runs it)."""

import sys
from pathlib import Path

if not __package__:
    # Run as a folder: Python put the folder itself first on the path, where `data` or `config` would shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from sd3tune.cli.main import main

if __name__ == "__main__":
    main()
