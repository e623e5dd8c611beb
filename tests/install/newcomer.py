"""A newcomer's path: the first page of the README, typed as it stands in a fresh clone, home and environment.

`make test-install` runs it. It needs a package index, some 6 GB of disk while it runs, and no account: what would need
one, or real weights, is left out, and the rehearsal stands for the real run.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
NEEDS_ACCOUNT_OR_WEIGHTS = {"hf auth login", "sd3tune train rex.yaml"}
STANDS_FOR = {"runs/rex": "runs/rehearsal"}
PICTURES = "images/*.png"


def commands(readme: str) -> list[str]:
    """The lines of the code blocks above the section `Why`, without comments."""
    first_page = readme.split("\n## Why", 1)[0]
    blocks = re.findall(r"^```\n(.*?)^```", first_page, flags=re.DOTALL | re.MULTILINE)
    return [line.split("   #")[0].rstrip() for block in blocks for line in block.splitlines() if line.strip()]


def typed(readme: str) -> list[str]:
    """What of it can be typed without an account, in order; `runs/rex` becomes the run of the rehearsal."""
    found = []
    for command in commands(readme):
        if command not in NEEDS_ACCOUNT_OR_WEIGHTS:
            words = re.split(r"(\s+)", command)
            found.append("".join(STANDS_FOR.get(word, word) for word in words))
    return found


def environment(home: Path) -> dict[str, str]:
    """This process's variables, without what belongs to an environment or to another home."""
    private = re.compile(r"^(HF_|SD3TUNE_|PYTHON|VIRTUAL_ENV|XDG_|MAKE|MFLAGS)")
    kept = {name: value for name, value in os.environ.items() if not private.match(name)}
    activated = str(Path(sys.prefix) / "bin") if sys.prefix != sys.base_prefix else ""
    path = os.pathsep.join(folder for folder in kept["PATH"].split(os.pathsep) if folder != activated)
    return {**kept, "PATH": path, "HOME": str(home)}


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="sd3tune-newcomer-") as folder:
        home, clone = Path(folder) / "home", Path(folder) / "sd3tune"
        photos = home / "photos" / "rex"
        photos.mkdir(parents=True)
        for picture in sorted((ROOT / "sd3tune" / "assets" / "demo").glob("*.png")):
            shutil.copy(picture, photos)
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        lines = typed((clone / "README.md").read_text(encoding="utf-8"))
        script = ["set -e"]
        for line in lines:
            script += [f"printf '\\n%4d s  $ %s\\n' $SECONDS {shlex.quote(line)}", line]
        started = time.monotonic()
        ended = subprocess.run(["bash", "-c", "\n".join(script)], cwd=clone, env=environment(home), check=False)
        drawn = sorted(clone.glob(PICTURES))
        took = f"{time.monotonic() - started:.0f} s"
        if ended.returncode or not drawn:
            print(f"\nafter {took}: exit code {ended.returncode}, {len(drawn)} pictures in images/", file=sys.stderr)
            return 1
        print(f"\nfrom the clone to {drawn[-1].relative_to(clone)} in {took}")
        return 0


if __name__ == "__main__":
    sys.exit(main())
