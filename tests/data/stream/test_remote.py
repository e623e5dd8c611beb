"""Shards behind a URL, and streamed datasets: equal to local shards, without leftovers, faults named."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import threading
from typing import ClassVar

import fsspec
import pytest

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.sources.dataset import write_parquet
from sd3tune.data.stream import shards as module
from sd3tune.data.stream.reader import ShardReader, shards_of
from sd3tune.errors import DataError
from tests.shards import picture, write_shards


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A server of files that fails the first request for each path in `failing`, after half of the file."""

    failing: ClassVar[set[str]] = set()

    def log_message(self, *args: object) -> None: ...

    def copyfile(self, source, outputfile) -> None:
        data = source.read()
        if self.path in self.failing:
            self.failing.discard(self.path)
            data = data[: len(data) // 2]
        outputfile.write(data)


@pytest.fixture
def server(tmp_path):
    """Return the URL of a server of `tmp_path`."""
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def read_all(folder, **source) -> list[tuple[str, str, list[str]]]:
    """Return digest, mark and captions of every sample of a source, with copies in `folder`."""
    data = DataConfig(sources=[source], resolution=64)
    shards = shards_of(data)
    reader = ShardReader(data, 0, shards, folder, pytest.fail)
    found = [one for number in range(len(shards)) for one in reader.read(number) if one]
    return [(one.digest, one.mark, [caption.text for caption in one.record.drawn]) for one in found]


def test_a_file_system_of_fsspec_is_read_like_files_and_leaves_no_copy(tmp_path) -> None:
    write_shards(tmp_path, 2, 3)
    memory = fsspec.filesystem("memory")
    for shard in sorted(tmp_path.glob("*.tar")):
        memory.pipe(f"/bucket/{shard.name}", shard.read_bytes())
    local = read_all(tmp_path / "copies", kind="webdataset", path=str(tmp_path))
    for pattern in ("memory://bucket/*.tar", "memory://bucket/shard-{000..001}.tar"):
        assert read_all(tmp_path / "copies", kind="webdataset", path=pattern) == local
    assert len(local) == 6
    assert list((tmp_path / "copies").iterdir()) == []


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("moto", "s3fs"))), reason="moto or s3fs is not installed")
def test_shards_in_s3_are_read_like_files(tmp_path, monkeypatch) -> None:
    import s3fs
    from moto.server import ThreadedMotoServer

    write_shards(tmp_path, 2, 3)
    running = ThreadedMotoServer("127.0.0.1", 0)
    running.start()
    host, port = running.get_host_and_port()
    for name, value in {"ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    try:
        bucket = s3fs.S3FileSystem(skip_instance_cache=True)
        bucket.mkdir("bucket")
        for shard in tmp_path.glob("*.tar"):
            bucket.put(str(shard), f"bucket/{shard.name}")
        local = read_all(tmp_path, kind="webdataset", path=str(tmp_path))
        assert read_all(tmp_path / "copies", kind="webdataset", path="s3://bucket/*.tar") == local
        with pytest.raises(DataError, match=r"s3://bucket/none\.tar: cannot be read"):
            read_all(tmp_path, kind="webdataset", path="s3://bucket/none.tar")
    finally:
        running.stop()


needs_aiohttp = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="aiohttp is not installed")


@needs_aiohttp
def test_shards_of_a_server_are_read_like_files_and_leave_no_copy(tmp_path, server, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0,))
    write_shards(tmp_path, 2, 3)
    local = read_all(tmp_path / "copies", kind="webdataset", path=str(tmp_path))
    Quiet.failing = {"/shard-001.tar"}
    remote = read_all(tmp_path / "copies", kind="webdataset", path=f"{server}/shard-{{000..001}}.tar")
    assert remote == local
    assert len(local) == 6
    assert not Quiet.failing
    assert list((tmp_path / "copies").iterdir()) == []


@needs_aiohttp
def test_a_shard_that_is_not_there_is_named(tmp_path, server, monkeypatch) -> None:
    monkeypatch.setattr(module, "_PAUSES", (0,))
    with pytest.raises(DataError, match=rf"{server}/none\.tar: cannot be read .*none\.tar.*; check data\.sources"):
        read_all(tmp_path, kind="webdataset", path=f"{server}/none.tar")


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "s3fs" else object())
    with pytest.raises(DataError, match=r"s3://bucket/a\.tar: needs s3fs: pip install 'sd3tune\[stream\]'"):
        read_all(tmp_path, kind="webdataset", path="s3://bucket/a.tar")


def test_a_streamed_dataset_has_the_images_and_captions_of_its_rows(tmp_path) -> None:
    for part in range(2):
        rows = [(f"{n}.png", picture(n), f"thing {n}") for n in range(part * 3, part * 3 + 3)]
        write_parquet(tmp_path / f"part-{part}.parquet", rows)
    source = {"kind": "dataset", "path": str(tmp_path / "part-*.parquet"), "streaming": True}
    data = DataConfig(sources=[source], resolution=64)
    assert len(shards_of(data)) == 2
    found = read_all(tmp_path / "copies", **source)
    assert [captions for _, _, captions in found] == [[f"thing {n}"] for n in range(6)]
    assert len({digest for digest, _, _ in found}) == 6
    with pytest.raises(DataError, match=r"has no column 'img'; set image_column: the columns are image, text"):
        shards_of(DataConfig(sources=[{**source, "image_column": "img"}], resolution=64))
