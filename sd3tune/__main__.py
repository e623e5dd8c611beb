"""`python -m sd3tune`, and the program by its path: `python sd3tune` (as `accelerate launch sd3tune` runs it)."""

import sys
from pathlib import Path

if not __package__:
    # Run by its path. Unless it is in safe-path mode, Python put this folder itself first on the path, where `data` or
    # `config` would shadow others.
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sd3tune.cli.main import main

if __name__ == "__main__":
    main()
