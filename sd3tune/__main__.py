"""Entry point of `python -m sd3tune` and of `python sd3tune`, which `accelerate launch sd3tune` runs."""

import sys
from pathlib import Path

if not __package__:
    # Run by path. Except in safe-path mode, Python has put this folder first on sys.path, where `data` or `config`
    # would shadow other packages.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3tune.cli.main import main

if __name__ == "__main__":
    main()
