"""Install the wheel alone in a fresh environment and home, and run the demo: `python tests/install/wheel.py WHEEL`.

`make build` runs it. It needs a package index and some 6 GB of disk while it runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

if __package__:
    from tests.install.newcomer import environment
else:
    from newcomer import environment


def main(wheel: Path, constraints: Path) -> int:
    """Return 0 when the installed wheel runs `sd3tune demo` outside the checkout, and 1 otherwise."""
    with tempfile.TemporaryDirectory(prefix="sd3tune-wheel-") as folder:
        home, venv = Path(folder) / "home", Path(folder) / "venv"
        home.mkdir()
        settings = environment(home)
        binaries = venv / ("Scripts" if os.name == "nt" else "bin")
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        install = [str(binaries / "python"), "-m", "pip", "install", "--quiet", "-c", str(constraints), str(wheel)]
        for command in (install, [str(binaries / "sd3tune"), "demo"]):
            ended = subprocess.run(command, cwd=home, env=settings, check=False)
            if ended.returncode:
                print(f"{' '.join(command)}: exit code {ended.returncode}", file=sys.stderr)
                return 1
        picture = home / "runs" / "demo" / "demo.png"
        print(f"{wheel.name} installs alone, and its demo drew {picture.relative_to(home)}")
        return 0 if picture.is_file() else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()))
