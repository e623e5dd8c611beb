"""TensorBoard and wandb, read back with their own readers: each step once, images, the config, and no secrets."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from sd3tune.commands.train import run_training
from sd3tune.config import dump_config
from sd3tune.tracking import wandb as wandb_tracker
from sd3tune.training.loop import View
from tests.local_wandb import local_wandb

BOTH = "tracking={tensorboard: true, wandb: {mode: offline, tags: [cute]}}"
PROMPTS = ["a photo of sks dog", "a cat"]
OPTIONS = (
    "train={steps: 5, log_every: 2}", "checkpoint.every=2",
    "preview={every: 2, prompts: [a photo of sks dog, a cat], steps: 1, guidance: 1.0}",
    "validation={holdout: 1, every: 2}",
)  # fmt: skip
TOKENS = {"HF_TOKEN": "hf_sentinel0123456789", "WANDB_API_KEY": "sentinel" * 5}
Curves = dict[str, list[tuple[int, float]]]


@pytest.fixture(autouse=True, scope="module")
def _tokens() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TOKENS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def tracked(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tracked"
    run_training(quick_config(run, *OPTIONS, BOTH))
    return run


def expected_curves(run: Path) -> Curves:
    """What `metrics.jsonl` and `validation.jsonl` say."""
    curves: Curves = {}
    for text in (run / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in ("loss", "lr", "grad_norm"):
            curves.setdefault(name, []).append((line["step"], line[name]))
        for name, value in line["loss_by_sigma"].items():
            curves.setdefault(f"loss_by_sigma/{name}", []).append((line["step"], value))
    if (run / "validation.jsonl").exists():
        for text in (run / "validation.jsonl").read_text().splitlines():
            line = json.loads(text)
            for name in ("loss", "base_loss"):
                curves.setdefault(f"validation/{name}", []).append((line["step"], line[name]))
                for sigmas, value in line[f"{name}_by_sigma"].items():
                    curves.setdefault(f"validation/{name}_by_sigma/{sigmas}", []).append((line["step"], value))
    return curves


def assert_same_curves(found: Curves, expected: Curves) -> None:
    assert found.keys() == expected.keys()
    for name, points in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in points], rel=1e-6), name


class TensorBoardLog:
    def __init__(self, run: Path) -> None:
        self.events = EventAccumulator(str(run / "logs" / "tensorboard"), {"scalars": 0, "images": 0, "tensors": 0})
        self.events.Reload()

    @property
    def curves(self) -> Curves:
        return {
            tag: [(event.step, event.value) for event in self.events.Scalars(tag)]
            for tag in self.events.Tags()["scalars"]
        }

    @property
    def images(self) -> dict[tuple[str, int], bytes]:
        tags = self.events.Tags()["images"]
        found = [((tag, event.step), event.encoded_image_string) for tag in tags for event in self.events.Images(tag)]
        assert len(dict(found)) == len(found)  # each step once
        return dict(found)

    @property
    def config(self) -> dict[str, Any]:
        (event,) = self.events.Tensors("config")
        return yaml.safe_load(event.tensor_proto.string_val[0].decode().removeprefix("```yaml").removesuffix("```"))


class WandbLog:
    """The newest offline run, from its transaction log: LevelDB's log format behind a header of seven bytes."""

    def __init__(self, run: Path) -> None:
        wandb.teardown()  # its service, which closes the file
        (self.folder,) = (run / "logs" / "wandb").glob("offline-run-*")
        (file,) = self.folder.glob("*.wandb")
        self.records = list(self._records(file.read_bytes()))
        (self.run,) = (record.run for record in self.records if record.HasField("run"))
        self.rows = [self._row(record.history.item) for record in self.records if record.HasField("history")]

    @staticmethod
    def _row(items: Any) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for item in items:
            name, *inner = item.nested_key or [item.key]
            value = json.loads(item.value_json)
            if inner:
                row.setdefault(name, {})[inner[0]] = value
            else:
                row[name] = value
        return row

    @staticmethod
    def _records(data: bytes) -> Iterator[Any]:
        assert data[:4] == b":W&B"
        at, part = 7, b""
        while at + 7 <= len(data):
            left = 32768 - at % 32768
            _, length, kind = struct.unpack("<IHB", data[at : at + 7]) if left >= 7 else (0, 0, 0)
            if kind == 0:  # padding up to the next block
                at += left
                continue
            part += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole record, or the last part of one
                yield wandb_internal_pb2.Record.FromString(part)
                part = b""

    @property
    def curves(self) -> Curves:
        curves: Curves = {}
        for row in self.rows:
            for name, value in row.items():
                if isinstance(value, float | int) and not name.startswith("_"):
                    curves.setdefault(name, []).append((row["_step"], value))
        return curves

    @property
    def exit_code(self) -> int:
        (code,) = (record.exit.exit_code for record in self.records if record.HasField("exit"))
        return code

    @property
    def images(self) -> dict[tuple[str, int], tuple[bytes, str]]:
        return {
            (name, row["_step"]): ((self.folder / "files" / value["path"]).read_bytes(), value["caption"])
            for row in self.rows
            for name, value in row.items()
            if isinstance(value, dict) and value.get("_type") == "image-file"
        }

    @property
    def config(self) -> dict[str, Any]:
        return {item.key: json.loads(item.value_json) for item in self.run.config.update if item.key != "_wandb"}


def assert_tells_the_whole_run(run: Path, steps: tuple[int, ...] = (0, 2, 4, 5)) -> None:
    expected = expected_curves(run)
    assert [step for step, _ in expected["loss"]] == [1, 2, 3, 4, 5]
    assert [step for step, _ in expected["validation/loss"]] == [0, 2, 4, 5]
    pictures = {
        (f"preview/{number}", step): (run / "samples" / f"step-{step:06d}-{number}.png").read_bytes()
        for step in steps
        for number in (0, 1)
    }
    board, cloud = TensorBoardLog(run), WandbLog(run)
    assert_same_curves(board.curves, expected)
    assert board.images == pictures
    assert_same_curves(cloud.curves, expected)
    prompts = {f"preview/{number}": prompt for number, prompt in enumerate(PROMPTS)}
    assert cloud.images == {key: (data, prompts[key[0]]) for key, data in pictures.items()}


def test_both_hold_the_curves_the_images_and_the_config(tracked: Path) -> None:
    assert_tells_the_whole_run(tracked)
    board, cloud = TensorBoardLog(tracked), WandbLog(tracked)
    assert board.config == cloud.config
    assert board.config["train"]["steps"] == 5
    assert board.config["flow"]["timesteps"]["kind"] == "logit_normal"
    assert cloud.run.display_name == "quick"
    assert cloud.run.project == "sd3tune"
    assert list(cloud.run.tags) == ["cute"]
    assert Image.open(BytesIO(board.images["preview/0", 5])).size == (64, 64)


def test_no_token_no_host_and_no_path_of_this_machine_is_in_any_log(tracked: Path, tmp_path: Path) -> None:
    for path in tracked.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        for name, token in TOKENS.items():
            assert token.encode() not in data, (path, name)
    host = socket.gethostname()
    logs = sorted((tracked / "logs").rglob("*"))
    for path in logs:
        assert not path.is_symlink(), path
        assert f".{host}" not in path.name
        if path.is_file():
            data = path.read_bytes()
            for secret in (str(tracked), str(Path.home()), str(Path.cwd()), *[host] * (len(host) > 5)):
                assert secret.encode() not in data, (path, secret)
    assert WandbLog(tracked).run.host == "-"
    assert not WandbLog(tracked).run.HasField("git")


def test_a_run_does_not_notice_its_trackers(tracked: Path, quick_config, tmp_path: Path, assert_equal_runs) -> None:
    run_training(quick_config(tmp_path / "plain", *OPTIONS))
    assert not (tmp_path / "plain" / "logs").exists()
    assert_equal_runs(tmp_path / "plain", tracked)


def test_the_summary_says_how_to_see_them_and_their_time_is_apart(quick_config, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run_training(quick_config(tmp_path / "my run", "tracking.tensorboard=true"))
    assert "curves    tensorboard --logdir 'my run/logs/tensorboard'" in capsys.readouterr().out
    timings = json.loads((tmp_path / "my run" / "run.json").read_text())["timings"]
    assert timings["tracking_s"] > 0


@pytest.mark.long
def test_a_killed_and_resumed_run_has_each_step_once_under_the_same_id(
    quick_config, tmp_path: Path, tracked: Path, assert_equal_runs
) -> None:
    run = tmp_path / "run"
    config = quick_config(run, *OPTIONS, BOTH)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    script = (
        "import os, sys\n"
        "from sd3tune.config import load_config\n"
        "from sd3tune.commands.train import run_training\n"
        "kill = lambda view: os.kill(os.getpid(), 9) if view.step == 4 and not os.path.exists('once') else None\n"
        "run_training(load_config(sys.argv[1], ['checkpoint.every=3']).config, callbacks=[kill])\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    environment.pop("WANDB_SERVICE", None)  # this process's, which outlives the other
    killed = subprocess.run([sys.executable, "-c", script, "run.yaml"], cwd=tmp_path, env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert [step for step, _ in TensorBoardLog(run).curves["loss"]] == [1, 2, 3, 4]  # one more than the checkpoint
    (attempt,) = (run / "logs" / "wandb").iterdir()
    run_training(config, resume=True)
    assert json.loads((run / "run.json").read_text())["resumes"] == [{"from_step": 3}]
    assert_tells_the_whole_run(run)
    assert attempt.name.endswith(f"-{WandbLog(run).run.run_id}")
    assert WandbLog(run).run.run_id != WandbLog(tracked).run.run_id


@pytest.mark.long
def test_trackers_switched_on_while_resuming_hold_the_whole_run(quick_config, tmp_path: Path) -> None:
    def stop(view: View) -> None:
        if view.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run_training(quick_config(tmp_path / "run", *OPTIONS), callbacks=[stop])
    run_training(quick_config(tmp_path / "run", *OPTIONS, BOTH), resume=True)
    assert_tells_the_whole_run(tmp_path / "run")


@pytest.mark.long
def test_a_new_run_in_the_folder_of_one_that_saved_nothing_has_logs_of_its_own(quick_config, tmp_path: Path) -> None:
    def stop(view: View) -> None:
        raise InterruptedError

    config = quick_config(tmp_path / "run", *OPTIONS, BOTH)
    with pytest.raises(InterruptedError):
        run_training(config, callbacks=[stop])
    first = WandbLog(tmp_path / "run").run.run_id
    assert WandbLog(tmp_path / "run").exit_code == 1
    run_training(config)
    assert_tells_the_whole_run(tmp_path / "run")
    assert WandbLog(tmp_path / "run").run.run_id != first
    assert WandbLog(tmp_path / "run").exit_code == 0


def test_without_a_network_wandb_goes_on_offline_and_says_how_to_upload(
    quick_config, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(wandb_tracker, "INIT_TIMEOUT", 2.0)
    wandb.teardown()  # it has read the environment
    run_training(quick_config(tmp_path / "run", "tracking.wandb={}"))
    printed = capsys.readouterr()
    assert "[wandb" not in printed.err
    log = WandbLog(tmp_path / "run")
    (warning,) = json.loads((tmp_path / "run" / "run.json").read_text())["warnings"]
    assert f"warning: {warning}" in printed.out
    assert warning.startswith("tracking.wandb: not online: ")
    assert warning.endswith(f"continuing offline; upload later with: wandb sync {log.folder}")
    assert f"curves    wandb sync {log.folder}" in printed.out
    assert_same_curves(log.curves, expected_curves(tmp_path / "run"))
    assert [path.name for path in (tmp_path / "run" / "logs" / "wandb").iterdir()] == [log.folder.name]


def test_online_a_resumed_run_goes_on_where_the_server_is(quick_config, tmp_path: Path, monkeypatch, capsys) -> None:
    def stop(view: View) -> None:
        if view.step == 5:
            raise InterruptedError

    config = quick_config(tmp_path / "run", *OPTIONS, "train.steps=7", "checkpoint.every=3", "tracking.wandb={}")
    with local_wandb() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        wandb.teardown()
        with pytest.raises(InterruptedError):
            run_training(config, callbacks=[stop])
        wandb.teardown()
        ((name, rows),) = server.history.items()
        assert [row["_step"] for row in rows] == [0, 1, 2, 3, 4]  # line 5 is written with 6, which never came
        assert server.exit_codes[name] == 1
        run_training(config, resume=True)
        wandb.teardown()
    assert server.history.keys() == {name}
    assert [row["_step"] for row in rows] == list(range(8))
    curves: Curves = {}
    for row in rows:
        for tag, value in row.items():
            if isinstance(value, float | int) and not tag.startswith("_"):
                curves.setdefault(tag, []).append((row["_step"], value))
    assert_same_curves(curves, expected_curves(tmp_path / "run"))
    assert [row["_step"] for row in rows if "preview/1" in row] == [0, 2, 4, 6, 7]
    pictures = [data for path, data in server.uploads.items() if path.startswith("media/images/preview/")]
    assert {path.read_bytes() for path in (tmp_path / "run" / "samples").glob("step-*.png")} <= set(pictures)
    assert server.exit_codes[name] == 0
    assert f"curves    {server.url}/someone/sd3tune/runs/{name}" in capsys.readouterr().out
    sent = json.dumps(server.queries).encode() + b"".join(server.uploads.values())
    for secret in (*TOKENS.values(), str(Path.home()), str(tmp_path), str(Path.cwd())):
        assert secret.encode() not in sent
