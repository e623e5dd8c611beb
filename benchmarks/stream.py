"""Streams of 1,000 to 100,000 small images in shards: images a second against a bare loop, memory, and resuming.

    python -m benchmarks.stream [FOLDER]

Each size runs in a process of its own. The bare loop reads the same tar files in order, and decodes and crops each
image once, on one thread. The stream also decodes each image once before, to know that it is sound. Neither encodes.
The result goes to benchmarks/results/stream.json.
"""

from __future__ import annotations

import io
import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

RESULT = Path(__file__).parent / "results" / "stream.json"
SIZES = (1_000, 10_000, 100_000)
_EACH = 1000
_SIDE = 64
_BATCH = 4


def write_shards(folder: Path, images: int) -> None:
    """Write shards of 1,000 different JPEGs of 64 px with captions."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for number in range(100):
        file = io.BytesIO()
        Image.effect_mandelbrot((_SIDE, _SIDE), (-2 + number / 100, -1.5, 1, 1.5), 50).convert("RGB").save(file, "JPEG")
        pictures.append(file.getvalue())
    for shard in range(images // _EACH):
        with tarfile.open(folder / f"shard-{shard:04d}.tar", "w") as tar:
            for number in range(shard * _EACH, (shard + 1) * _EACH):
                picture, comment = pictures[number % 100], f"{number:08d}".encode()
                segment = b"\xff\xfe" + (2 + len(comment)).to_bytes(2, "big") + comment
                for name, data in (("jpg", picture[:2] + segment + picture[2:]), ("txt", b"a picture %d" % number)):
                    entry = tarfile.TarInfo(f"{number:08d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def _resident() -> float:
    """Return the largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path) -> dict[str, Any]:
    """Read all shards of a folder once, as a bare loop and as a stream, and resume the stream in the middle."""
    from sd3tune.config.sections.data import DataConfig
    from sd3tune.data.ahead import in_pieces
    from sd3tune.data.crops import Crop, pixels
    from sd3tune.data.images import open_image
    from sd3tune.data.stream.reader import ShardReader, StreamedImage, shards_of
    from sd3tune.data.stream.stream import Stream

    crop = Crop((_SIDE, _SIDE), (0, 0, _SIDE, _SIDE), False)
    data = DataConfig(sources=[{"kind": "webdataset", "path": str(folder)}], resolution=_SIDE)  # type: ignore[list-item]
    shards = shards_of(data)

    def stream(read: list[int], notes: Path | None) -> Stream[StreamedImage]:
        reader = ShardReader(data, 0, shards, folder, print)

        def counted(number: int) -> list[StreamedImage | None]:
            read.append(number)
            return reader.read(number)

        return Stream(
            counted,
            lambda one: 0,
            seed=0,
            rank=0,
            world=1,
            shards=len(shards),
            buffer=4,
            batch_size=_BATCH,
            notes=notes,
        )

    images, before = len(shards) * _EACH, _resident()
    began, count = time.perf_counter(), 0
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for entry in tar:
                if entry.name.endswith(".jpg"):
                    opened = Image.open(io.BytesIO(tar.extractfile(entry).read())).convert("RGB")  # type: ignore[union-attr]
                    count += len(pixels(opened, crop))
    bare = count / (time.perf_counter() - began)

    notes, opened_shards = folder / "notes.jsonl", list[int]()
    notes.unlink(missing_ok=True)
    began, found = time.perf_counter(), list[list[str]]()
    streamed, resident = stream(opened_shards, notes), list[float]()
    for number in range(images // _BATCH):
        batch = streamed.batch(number)
        list(in_pieces(lambda one: pixels(open_image(one.record.image), crop), batch, 1))
        found.append([one.record.image.name for one in batch])
    seconds = time.perf_counter() - began
    resident.append(_resident())
    streamed.close()

    middle, again = len(found) // 2, list[int]()
    began, resumed = time.perf_counter(), stream(again, notes)
    equal = [[one.record.image.name for one in resumed.batch(n)] for n in range(middle, middle + 100)]
    resumed.close()
    return {
        "images": images,
        "bare_per_second": round(bare),
        "stream_per_second": round(images / seconds),
        "resident_before_mb": round(before),
        "resident_after_mb": round(resident[-1]),
        "different_images": len({name for batch in found for name in batch}),
        "resumed_at": middle,
        "resumed_equal": equal == found[middle : middle + 100],
        "shards_read_to_resume": len(again),
        "shards": len(shards),
    }


def main(where: Path) -> None:
    """Measure each size in a process, write the result, and print a table."""
    rows = []
    for images in SIZES:
        folder = where / str(images)
        write_shards(folder, images)
        printed = subprocess.run(
            [sys.executable, "-m", "benchmarks.stream", "--measure", str(folder)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        rows.append(json.loads(printed.splitlines()[-1]))
        print(rows[-1], flush=True)
    RESULT.write_text(json.dumps({"python": sys.version.split()[0], "side": _SIDE, "rows": rows}, indent=2) + "\n")
    print("| images | bare loop, images/s | stream, images/s | memory above start | resumed exactly |")
    print("|---|---|---|---|---|")
    for row in rows:
        grown = row["resident_after_mb"] - row["resident_before_mb"]
        bare, speed, equal = row["bare_per_second"], row["stream_per_second"], "yes" if row["resumed_equal"] else "NO"
        print(f"| {row['images']:,} | {bare:,} | {speed:,} | {grown} MB | {equal} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(sys.argv[1] if len(sys.argv) > 1 else temporary))
