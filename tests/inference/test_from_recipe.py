"""`infer --from`: a picture once more, from the recipe inside it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sd3tune.adapter.file import read_adapter, write_adapter
from sd3tune.commands.infer import run_infer
from sd3tune.errors import AdapterError, ConfigError, ModelError, UserError
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.recipes import recipe_key
from sd3tune.model.base.resolve import resolve_base
from tests.local_hub import COMMIT, hub
from tests.pictures import distance

DIGESTS = ("sha256", "tensors_sha256")
Draw = Callable[..., list[Path]]
MODULE = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for `tiny` that shows, in a run's folder."""
    folder = tmp_path_factory.mktemp("runs") / "dog" / "adapter"
    factors = {
        f"{MODULE}.lora_A": torch.ones(2, 64) / 8,
        f"{MODULE}.lora_B": torch.linspace(-1, 1, 128).reshape(64, 2),
    }
    base = {"base": "tiny", "base_kind": "tiny", "resolution": 32, "max_sequence_length": 16}
    return write_adapter(folder, factors, {**base, "encoders": ["clip_l", "clip_g", "t5"]})


@pytest.fixture
def draw(tmp_path: Path) -> Draw:
    def draw(*loras: object, **options: object) -> list[Path]:
        given = {"prompt": None, "out": tmp_path / "images", "before": False, **options}
        return run_infer(InferenceJob.from_fields(loras=[str(lora) for lora in loras], **given))

    return draw


@pytest.fixture(scope="module")
def picture(adapter: Path) -> Path:
    """Drawn with no setting as it is by default. Read only."""
    options = {"negative": "a cat", "seed": 5, "steps": 2, "guidance": 3.0, "size": (48, 32)}
    more = {"sampler": "heun", "shift": 2.0, "t5_tokens": 20, "out": adapter.parents[1] / "images"}
    return run_infer(
        InferenceJob.from_fields(loras=[f"{adapter}@0.7"], prompt="a dog", **options, **more, before=False)
    )[0]


def recipe_of(path: Path) -> dict:
    with Image.open(path) as image:
        return json.loads(image.text["sd3tune"])


def edited(picture: Path, target: Path, **changes: object) -> Path:
    info = PngInfo()
    info.add_itxt("sd3tune", json.dumps(recipe_of(picture) | changes))
    with Image.open(picture) as image:
        image.save(target, pnginfo=info)
    return target


def test_a_picture_is_repeated_from_itself_with_the_adapter_found_nearby(picture: Path, draw: Draw) -> None:
    (again,) = draw(from_picture=picture)
    assert distance(again, picture) == 0
    assert recipe_of(again) == recipe_of(picture)


def test_without_t5_and_without_adapter_too(draw: Draw) -> None:
    (picture,) = draw(prompt="a dog", base="tiny", size=(32, 32), steps=2, t5=False)
    (again,) = draw(from_picture=picture)
    assert recipe_of(again) == recipe_of(picture)
    assert recipe_of(again)["encoders"] == ["clip_l", "clip_g"]
    assert distance(again, picture) == 0
    (other,) = draw(from_picture=picture, t5=True)
    assert distance(again, other) > 8


def test_flags_override_the_recipe(picture: Path, draw: Draw) -> None:
    other, following = draw(from_picture=picture, seed=6, steps=3, num=2)
    expected = recipe_of(picture) | {"seed": 6, "steps": 3}
    assert recipe_of(other) == expected
    assert recipe_of(following) == expected | {"seed": 7}
    assert distance(other, picture) > 8


def test_elsewhere_the_adapter_is_found_in_runs_or_asked_for(
    picture: Path, adapter: Path, draw: Draw, tmp_path: Path, monkeypatch
) -> None:
    alone = Path(shutil.copy(picture, tmp_path / "a.png"))
    digest = recipe_of(picture)["loras"][0]["sha256"][:12]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=rf"drawn with the adapter 'dog' \(sha256 {digest}\.\.\.\), .*--lora$"):
        draw(from_picture=alone)
    (tmp_path / "runs").symlink_to(adapter.parents[2])
    assert distance(draw(from_picture=alone)[0], picture) == 0


def test_the_adapter_of_a_run_inside_a_folder_of_runs_is_found(
    picture: Path, adapter: Path, draw: Draw, tmp_path: Path, monkeypatch
) -> None:
    """As the demo's are, in `runs/demo/with_prior`."""
    monkeypatch.chdir(tmp_path)
    alone = Path(shutil.copy(picture, tmp_path / "a.png"))
    run = Path(shutil.copytree(adapter.parents[1], tmp_path / "runs" / "demo" / "with_prior"))
    with pytest.raises(AdapterError, match="drawn with the adapter 'dog'"):
        draw(from_picture=alone)
    (run / "run.json").write_text("{}")
    assert distance(draw(from_picture=alone)[0], picture) == 0


def test_an_adapter_of_another_content_is_not_taken_for_it(
    picture: Path, adapter: Path, draw: Draw, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = Path(shutil.copy(picture, tmp_path / "a.png"))
    found = read_adapter(adapter)
    down, up = found.factors[MODULE]
    other = write_adapter(tmp_path / "adapter", {f"{MODULE}.lora_A": down, f"{MODULE}.lora_B": -up}, found.contract)
    with pytest.raises(AdapterError, match="drawn with the adapter 'dog'"):
        draw(from_picture=alone)
    (drawn,) = draw(other, from_picture=alone)
    assert "a.png was drawn without" in capsys.readouterr().out
    assert distance(drawn, picture) > 8
    assert recipe_of(drawn)["loras"][0]["weight"] == 1.0
    (same,) = draw(adapter, from_picture=alone)
    assert "warning" not in capsys.readouterr().out
    assert distance(same, picture) == 0, "with the weight of the recipe"
    assert recipe_of(draw(f"{adapter}@0.2", from_picture=alone)[0])["loras"][0]["weight"] == 0.2


def test_an_adapter_is_known_by_its_tensors_and_to_earlier_pictures_by_its_file(
    picture: Path, adapter: Path, draw: Draw, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = Path(shutil.copy(picture, tmp_path / "a.png"))
    loras = [{key: of for key, of in lora.items() if key != "tensors_sha256"} for lora in recipe_of(picture)["loras"]]
    earlier = edited(picture, tmp_path / "earlier.png", loras=loras)
    near = tmp_path / "adapter" / adapter.name
    near.parent.mkdir()
    with safe_open(adapter, framework="pt") as file:
        save_file(load_file(adapter), near, {**file.metadata(), "modelspec.title": "another header"})
    (tmp_path / "dog.safetensors").write_text("no tensors")
    assert distance(draw(from_picture=alone)[0], picture) == 0
    with pytest.raises(AdapterError, match="drawn with the adapter 'dog'"):
        draw(from_picture=earlier)
    shutil.copy(adapter, near)
    assert distance(draw(from_picture=earlier)[0], picture) == 0
    assert recipe_key(recipe_of(earlier)) == recipe_key(recipe_of(picture))


def test_another_base_is_an_error_unless_it_was_asked_for(picture: Path, draw: Draw, tmp_path: Path, capsys) -> None:
    other = edited(picture, picture.with_name("other.png"), base_fingerprint="0" * 64)
    with pytest.raises(ModelError, match=r"was drawn with tiny, whose weights differ from this tiny; .* with --base$"):
        draw(from_picture=other)
    draw(from_picture=other, base="tiny")
    assert "warning: " in capsys.readouterr().out


def test_a_local_base_is_asked_for(draw: Draw, tmp_path: Path) -> None:
    base = shutil.copytree(resolve_base("tiny").path, tmp_path / "mine")
    (picture,) = draw(prompt="a dog", base=str(base), size=(32, 32), steps=1)
    with pytest.raises(ModelError, match=r"drawn with a local base named 'mine'; give it with --base$"):
        draw(from_picture=picture)
    assert distance(draw(from_picture=picture, base=str(base))[0], picture) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": "two"}, "steps"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"sheet": "grid"}, "shows several pictures"),
        ({"loras": [{"name": "dog"}]}, "sha256"),
        ({"dtype": "fp8"}, "dtype"),
        ({"steps": 10**12}, "--steps 1000000000000: at most 10000"),
        ({"steps": 10**30}, "at most 10000"),
        ({"size": [10**9, 10**9]}, "--size"),
        ({"guidance": float("nan")}, "--guidance nan: a finite number"),
        ({"seed": -1}, "--seed -1"),
        ({"prompt": "a\0b"}, "--prompt: holds NUL characters"),
        ({"negative": "a \ud800 cat"}, r"--negative: holds half a character (\ud800)"),
        ({"prompt_t5": "\udce9"}, "--prompt-t5: holds half a character"),
        ({"max_sequence_length": 10**9}, "--t5-tokens 1000000000: from 1 to 512"),
        ({"loras": [{"name": "dog", "sha256": "0", "weight": float("inf")}]}, "--lora"),
        ({"base": "/etc", "loras": []}, "drawn with a local base named '/etc'; give it with --base"),
        ({"base": "..", "loras": []}, "drawn with a local base named '..'; give it with --base"),
    ],
)
def test_a_recipe_that_was_tampered_with_is_one_line(change: dict, said: str, picture: Path, draw: Draw) -> None:
    with pytest.raises(UserError) as caught:
        draw(from_picture=edited(picture, picture.with_name("bad.png"), **change))
    assert said in caught.value.problems[0]


@pytest.mark.parametrize(
    "name",
    [
        "/proc/kmsg",
        "/proc/self/mem",
        "**/*",
        "a**",
        "../../../../../**/*",
        "{here}/a.png",
        "../b/a.png",
        "[!x]*",
        "..",
        "",
    ],
)
def test_a_name_in_a_recipe_is_no_path_and_no_pattern(
    name: str, picture: Path, draw: Draw, tmp_path: Path, monkeypatch
) -> None:
    """Even of a file that has the digest: whoever writes recipes would learn whether it is there."""
    for folder in ("a/b", "a/c"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "c")
    secret = Path(shutil.copy(picture, tmp_path / "a" / "b" / "a.png"))
    named = {"name": name.format(here=secret.parent), "sha256": hashlib.sha256(secret.read_bytes()).hexdigest()}
    image = edited(picture, tmp_path / "a" / "c" / "image.png", image=named, strength=0.5)
    with pytest.raises(
        ConfigError, match="is not found near it; name its folder with --look-in, or give it with --image"
    ):
        draw(from_picture=image)
    lora = edited(picture, tmp_path / "a" / "c" / "lora.png", loras=[{**named, "weight": 1.0}])
    with pytest.raises(AdapterError, match="is not found near it or in runs/; name its folder with --look-in"):
        draw(from_picture=lora)


def test_adapter_and_start_image_are_found_in_a_folder_that_is_given(
    picture: Path, adapter: Path, draw: Draw, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("one/two/three/four", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(adapter, tmp_path / "elsewhere" / "dog.safetensors")
    Image.new("RGB", (48, 32), "red").save(tmp_path / "elsewhere" / "start.png")
    digest = hashlib.sha256((tmp_path / "elsewhere" / "start.png").read_bytes()).hexdigest()
    start = {"image": {"name": "start.png", "sha256": digest}, "strength": 0.5}
    alone = edited(picture, tmp_path / "one" / "two" / "three" / "four" / "a.png", **start)
    with pytest.raises(UserError, match="not found near it"):
        draw(from_picture=alone)
    assert recipe_of(draw(from_picture=alone, look_in=[tmp_path / "elsewhere"])[0])["image"] == start["image"]
    for name in ("dog.safetensors", "start.png"):  # the third folder above the picture's
        shutil.copy(tmp_path / "elsewhere" / name, tmp_path / "one" / name)
    draw(from_picture=alone)


def test_nothing_is_fetched_unless_it_is_allowed_and_what_comes_is_compared(
    picture: Path, adapter: Path, draw: Draw, tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "there" / "adapter").mkdir(parents=True)
    shutil.copy(adapter, tmp_path / "there" / "adapter")
    own = recipe_of(picture)["loras"][0]
    mine = edited(picture, tmp_path / "mine.png", loras=[{**own, "name": f"me/dog:{COMMIT}"}])
    base = edited(picture, tmp_path / "base.png", base="me/base", loras=[])
    other = edited(
        picture, tmp_path / "other.png", loras=[{**own, "name": f"me/dog:{COMMIT}", **dict.fromkeys(DIGESTS, "0" * 64)}]
    )
    with hub(tmp_path / "there") as (endpoint, requests):
        here = {"ENDPOINT": endpoint, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": False}
        template = f"{endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {**here, "HUGGINGFACE_CO_URL_TEMPLATE": template}.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        for asked in (mine, base):
            with pytest.raises(UserError, match=r"me/\w+: not on this machine; --allow-download fetches what"):
                draw(from_picture=asked)
        assert requests == []
        assert distance(draw(from_picture=mine, allow_download=True)[0], picture) == 0
        requests.clear()
        assert distance(draw(from_picture=mine)[0], picture) == 0, "it is on this machine now"
        assert requests == []
        with pytest.raises(AdapterError, match=rf"the adapter me/dog:{COMMIT} is another file than the picture was"):
            draw(from_picture=other)


def test_a_picture_that_is_made_to_harm_is_one_line(draw: Draw, tmp_path: Path) -> None:
    def png(name: str, width: int, *texts: bytes) -> Path:
        header = struct.pack(">IIBBBBB", width, width, 8, 2, 0, 0, 0)
        parts = [(b"IHDR", header), *((b"tEXt", b"sd3tune\0" + text) for text in texts), (b"IDAT", b""), (b"IEND", b"")]
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in parts
        ))  # fmt: skip
        return tmp_path / name

    bomb = zlib.compress(b"[" * 2**27)
    made = [
        png("pixels.png", 2**17, b"{}"), png("deep.png", 16, b"[" * 100_000), png("digits.png", 16, b"1" * 100_000),
        png("long.png", 16, b'{"base": "' + b"x" * 2**21 + b'"}'),
    ]  # fmt: skip
    packed = made[1].read_bytes().replace(b"tEXt", b"zTXt")
    (tmp_path / "packed.png").write_bytes(packed.replace(b"[" * 100_000, b"\0" + bomb))
    os.mkfifo(tmp_path / "fifo.png")
    for path in [*made, tmp_path / "packed.png"]:
        with pytest.raises(ConfigError, match=rf"^--from .*{path.name}: holds no recipe"):
            draw(from_picture=path)
    with pytest.raises(ConfigError, match="no such file"):
        draw(from_picture=tmp_path / "fifo.png")


def test_what_holds_no_recipe_is_one_line(draw: Draw, tmp_path: Path) -> None:
    Image.new("RGB", (16, 16)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    for name in ("plain.png", "text.png"):
        with pytest.raises(ConfigError, match=rf"^--from .*{name}: holds no recipe; only pictures drawn by"):
            draw(from_picture=tmp_path / name)
    with pytest.raises(ConfigError, match=r"none.png: no such file$"):
        draw(from_picture=tmp_path / "none.png")
