"""Finding a base: tiny bases, folders, and the Hub through huggingface_hub's real client."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd3tune.config.sections.model import ModelConfig
from sd3tune.errors import ModelError
from sd3tune.model.base.base import Base
from sd3tune.model.base.offline import TINY_SHAPES, bases_dir
from sd3tune.model.base.parts import ENCODER_PARTS
from sd3tune.model.base.resolve import local_base, resolve_base
from sd3tune.model.base.weights import tensor_headers
from sd3tune.model.load.components import load_transformer
from tests.local_hub import COMMIT, ask, hub

Client = Callable[..., subprocess.CompletedProcess[str]]
PARTS = ("transformer", "vae", "scheduler", *(part for parts in ENCODER_PARTS.values() for part in parts))


@pytest.fixture(scope="module")
def tiny() -> Base:
    return resolve_base("tiny")


@pytest.fixture
def folder(tiny: Base, tmp_path: Path) -> Path:
    """A base of one's own, to break."""
    return Path(shutil.copytree(tiny.path, tmp_path / "my-model"))


def edit(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})


# Names


def test_tiny_is_the_medium_shape_and_is_built_once(tiny: Base) -> None:
    before = (tiny.path / "model_index.json").stat().st_mtime_ns
    again = resolve_base("tiny-sd35-medium")
    assert again.path == tiny.path
    assert (again.path / "model_index.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", TINY_SHAPES)
def test_every_part_of_a_tiny_base_has_a_folder_and_a_fingerprint(name: str) -> None:
    base = resolve_base(name)
    assert (base.kind, base.name, base.revision) == ("tiny", name, None)
    for part in PARTS:
        assert base.folder(part) == base.path / part
        assert re.fullmatch(r"[0-9a-f]{64}", base.fingerprint(part))


def test_the_cache_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SD3TUNE_CACHE", str(tmp_path))
    assert bases_dir() == tmp_path / "bases"
    monkeypatch.delenv("SD3TUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert bases_dir() == tmp_path / ".cache" / "sd3tune" / "bases"


def test_a_folder_is_a_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_base(str(folder)) == Base(str(folder), "folder", folder)
    monkeypatch.chdir(folder.parent)
    assert resolve_base("my-model").path == folder


def test_a_base_of_this_machine_is_found_without_asking_the_hub(folder: Path, tiny: Base) -> None:
    assert local_base(ModelConfig(base="tiny")) == tiny
    assert local_base(ModelConfig(base=str(folder))) == resolve_base(str(folder))
    assert local_base(ModelConfig(base="tinny")) is None


def test_a_misspelt_name_gets_a_suggestion(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong, right in (
        ("tiny-sd35-medum", "tiny-sd35-medium"),
        (str(folder.parent / "my-modl"), str(folder)),
    ):
        with pytest.raises(ModelError, match=f"did you mean '{re.escape(right)}'"):
            resolve_base(wrong)
    monkeypatch.chdir(folder.parent)
    with pytest.raises(ModelError, match="did you mean 'my-model'"):
        resolve_base("my-modle")
    with pytest.raises(ModelError, match=r"no such base.*the offline bases are tiny, tiny-sd3"):
        resolve_base("quite-unlike-anything")


def test_resolving_a_base_does_not_import_torch(folder: Path) -> None:
    script = (
        "import sys; from sd3tune.model.base.resolve import resolve_base as r; r(sys.argv[1]).fingerprint('vae');"
        "print([m for m in ('torch', 'diffusers', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


# Broken folders


def test_a_folder_that_is_no_sd3_model_is_refused(folder: Path) -> None:
    index = folder / "model_index.json"
    index.write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ModelError, match="FluxPipeline, not a Stable Diffusion 3"):
        resolve_base(str(folder))
    index.write_text("{")
    with pytest.raises(ModelError, match=r"model_index\.json: not valid JSON"):
        resolve_base(str(folder))
    index.unlink()
    with pytest.raises(ModelError, match=r"no model_index\.json"):
        resolve_base(str(folder))
    with pytest.raises(ModelError, match=r"config\.json: not a \.safetensors file"):
        resolve_base(str(folder / "vae" / "config.json"))


def test_a_missing_part_is_named(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    shutil.rmtree(folder / "text_encoder_3")
    base = resolve_base(str(folder))
    with pytest.raises(ModelError, match=r"no vae/config\.json"):
        base.folder("vae")
    with pytest.raises(ModelError, match=r"no text_encoder_3/config\.json.*model\.t5=false"):
        base.fingerprint("text_encoder_3")


def test_pickled_weights_are_refused(folder: Path) -> None:
    part = folder / "text_encoder"
    torch.save(load_file(part / "model.safetensors"), part / "pytorch_model.bin")
    base = resolve_base(str(folder))
    base.folder("text_encoder")
    (part / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"text_encoder: no safetensors.*pytorch_model.bin is pickled and is refused"):
        base.folder("text_encoder")
    assert base.folder("text_encoder", weights=False) == part


def test_a_variant_alone_is_explained_and_beside_the_plain_file_ignored(folder: Path) -> None:
    part, base = folder / "vae", resolve_base(str(folder))
    before = base.fingerprint("vae")
    plain = part / "diffusion_pytorch_model.safetensors"
    shutil.copy(plain, part / "diffusion_pytorch_model.fp16.safetensors")
    assert base.fingerprint("vae") == before
    plain.unlink()
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.fp16\.safetensors is a variant"):
        base.folder("vae")


def test_shards_are_the_same_model_and_a_missing_one_is_named(folder: Path, tiny: Base) -> None:
    part, base = folder / "transformer", resolve_base(str(folder))
    model = load_transformer(tiny, torch.float32)
    shutil.rmtree(part)
    model.save_pretrained(part, max_shard_size="1MB")
    shards = sorted(part.glob("*.safetensors"))
    assert len(shards) > 1
    again = load_transformer(base, torch.float32)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    shutil.copy(tiny.path / "transformer" / "config.json", part)
    assert base.fingerprint("transformer") == tiny.fingerprint("transformer")
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"weights that are missing: {shards[1].name}"):
        base.folder("transformer")


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]", b"\x05" + b"\0" * 7 + b'{"a":']
)
def test_a_file_that_is_not_safetensors_is_one_line(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated or not a safetensors file") as caught:
        tensor_headers(file)
    assert "\n" not in str(caught.value)


# Fingerprints


def test_a_fingerprint_depends_on_the_content_alone(folder: Path, tiny: Base) -> None:
    script = (
        "import sys; from sd3tune.model.base.resolve import resolve_base\n"
        "for part in sys.argv[2:]: print(resolve_base(sys.argv[1]).fingerprint(part))"
    )
    os.utime(folder / "vae" / "diffusion_pytorch_model.safetensors", (1, 1))
    done = subprocess.run([sys.executable, "-c", script, str(folder), *PARTS], capture_output=True, text=True)
    assert done.stdout.split() == [tiny.fingerprint(part) for part in PARTS], done.stderr


def test_a_fingerprint_does_not_depend_on_the_order_of_the_header(folder: Path, tiny: Base) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    turned = json.dumps(dict(reversed(header.items()))).encode()
    file.write_bytes(len(turned).to_bytes(8, "little") + turned + raw[8 + length :])
    assert resolve_base(str(folder)).fingerprint("vae") == tiny.fingerprint("vae")


def test_a_fingerprint_changes_with_one_tensor_or_one_setting(folder: Path, tiny: Base) -> None:
    base = resolve_base(str(folder))
    edit(folder / "transformer" / "diffusion_pytorch_model.safetensors", "proj_out.bias")
    for part in ("text_encoder/config.json", "scheduler/scheduler_config.json", "tokenizer/merges.txt"):
        with (folder / part).open("a") as stream:
            stream.write("\n")
    changed = {part for part in PARTS if base.fingerprint(part) != tiny.fingerprint(part)}
    assert changed == {"transformer", "text_encoder", "scheduler", "tokenizer"}


def test_fingerprints_differ_between_shapes() -> None:
    bases = [resolve_base(name) for name in ("tiny-sd3", "tiny-sd35-medium", "tiny-sd35-large")]
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        assert len({base.fingerprint(part) for base in bases}) == 3


# The Hub


@pytest.fixture
def client(tmp_path: Path) -> Client:
    """`client(endpoint, script, ...)`: lines of Python with a cache of their own; see `local_hub.ask`."""
    return lambda endpoint, script, *args: ask(endpoint, tmp_path / "hf", script, *args)


REFUSALS = """
import sys
from sd3tune.errors import ModelError
from sd3tune.model.base.resolve import resolve_base
for name in sys.argv[1:]:
    try:
        resolve_base(*name.split("@"))
    except ModelError as error:
        print(error)
"""


def test_each_refusal_of_the_hub_is_one_line_with_the_way_out(tiny: Base, client: Client) -> None:
    names = ("gated/sd3", "unauthorized/sd3", "missing/sd3", "good/sd3@nonsense", "broken/sd3", "a--b/..c")
    with hub(tiny.path) as (endpoint, _):
        done = client(endpoint, REFUSALS, *names)
    lines = done.stdout.splitlines()
    assert len(lines) == len(names), done.stdout + done.stderr
    gated, unauthorized, missing, revision, broken, invalid = lines
    for line, name in ((gated, "gated/sd3"), (unauthorized, "unauthorized/sd3")):
        for part in ("access token", "`hf auth login`", f"https://huggingface.co/{name}", "settings/tokens"):
            assert part in line
    assert "this model is gated" in gated
    assert "no such model" in unauthorized
    assert missing.startswith("missing/sd3: no such model on the Hub")
    assert revision == "good/sd3: the Hub has no revision 'nonsense' of this model"
    assert "HTTP status 500" in broken
    assert "a--b/..c: no such base" in invalid


PINNED = """
from sd3tune.model.base.hub import download
try:
    download("good/sd3", "a" * 40, ["*.json"])
except ModelError as error:
    print(error)
"""


def test_without_network_there_is_one_line(client: Client) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    done = client(f"http://127.0.0.1:{port}", REFUSALS + PINNED, "good/sd3")
    line, of_a_commit = done.stdout.splitlines()
    assert line.startswith("good/sd3: not on this machine, and the Hub cannot be reached"), done.stderr
    assert of_a_commit == line
    assert done.stderr == ""  # the client tries again and again for a commit


DOWNLOAD = """
import sys
from sd3tune.model.base.resolve import resolve_base
base = resolve_base("good/sd3")
print(base.kind, base.revision)
if sys.argv[1] == "load":
    import torch
    from sd3tune.model.load import components
    print(components.transformer_config(base)["num_layers"], (base.path / "transformer/config.json").exists(),
          len(list((base.path / "transformer").iterdir())))
    components.load_transformer(base, torch.float32)
for part in sys.argv[2:]:
    print(base.fingerprint(part))
"""


LOCAL = """
from sd3tune.config import ModelConfig
from sd3tune.model.base.resolve import local_base
print(local_base(ModelConfig(base="good/sd3")).fingerprint("tokenizer_3"))
print(local_base(ModelConfig(base="never/seen")))
"""


def test_a_hub_base_is_downloaded_part_by_part_and_then_needs_no_network(
    tiny: Base,
    folder: Path,
    client: Client,
) -> None:
    shutil.copy(folder / "vae/config.json", folder / "vae/diffusion_pytorch_model.fp16.safetensors")
    (folder / "README.md").write_text("a card")
    parts = ("transformer", "vae", "tokenizer_3")
    expected = [tiny.fingerprint(part) for part in parts]
    with hub(folder) as (endpoint, requests):
        done = client(endpoint, DOWNLOAD, "load", *parts)
    assert done.stdout.split() == ["hub", COMMIT, "4", "True", "1", *expected], done.stderr
    fetched = {request.split(f"{COMMIT}/")[1] for request in requests if "/resolve/" in request}
    assert {path.split("/")[0] for path in fetched} == {"model_index.json", *parts}
    assert not any("fp16" in path for path in fetched)
    offline = client(endpoint, DOWNLOAD, "look", *parts)  # the server is gone
    assert (offline.stdout.split(), offline.stderr) == (["hub", COMMIT, *expected], "")
    local = client(endpoint, LOCAL)
    assert (local.stdout.split(), local.stderr) == ([expected[2], "None"], "")


TOKENIZERS = """
import sys
from sd3tune.errors import ModelError
from sd3tune.model.base.resolve import resolve_base
for source in sys.argv[2:]:
    base = resolve_base(sys.argv[1], tokenizers=source or None)
    try:
        print(base.fingerprint("tokenizer"))
    except ModelError as error:
        print(error)
"""


def test_a_single_file_gets_its_tokenizers_from_the_hub(
    tiny: Base, client: Client, write_released: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    file = write_released("sd35-medium", tmp_path / "sd3.5_medium.safetensors")
    with hub(tiny.path) as (endpoint, requests):
        done = client(endpoint, TOKENIZERS, str(file), "", "good/sd3", "gated/sd3")
    of_the_variant, named, gated = done.stdout.splitlines()
    assert of_the_variant == named == tiny.fingerprint("tokenizer"), done.stderr
    fetched = {request.split(" ")[1] for request in requests if "/resolve/" in request}
    assert all("/tokenizer/" in path for path in fetched)
    assert any(path.startswith("/stabilityai/stable-diffusion-3.5-medium/") for path in fetched)
    assert gated.startswith("tokenizers: gated/sd3: this model is gated: accept its licence")
    assert "`hf auth login`; or give model.tokenizers: a folder that holds tokenizer, tokenizer_2 and" in gated


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        ("sd3 SD3 sd3-medium sd3_medium stable-diffusion-3-medium StableDiffusion3", "3-medium-diffusers"),
        (
            "sd35 sd3.5 sd3.5-medium sd35-medium SD3.5M stable-diffusion-3.5-medium 3.5-medium",
            "3.5-medium",
        ),
        ("sd35-large SD3.5L sd3.5_large stable_diffusion-3.5-large sd35l", "3.5-large"),
        ("sd3.5-large-turbo sd35_large_turbo SD3.5-Turbo", "3.5-large-turbo"),
        ("sd35-mediun sd35-lage", None),
    ],
)
def test_a_released_model_by_another_name_is_suggested(names: str, meant: str | None) -> None:
    for name in names.split():
        with pytest.raises(
            ModelError, match=r"no such base: .*; did you mean 'stabilityai/stable-diffusion-3"
        ) as caught:
            resolve_base(name)
        if meant is not None:
            assert caught.value.problems[0].endswith(f"did you mean 'stabilityai/stable-diffusion-{meant}'?")


@pytest.mark.parametrize(("name", "meant"), [("tinny", "tiny"), ("tiny-sd35", "tiny-sd3"), ("nanno", "nano")])
def test_an_offline_base_by_nearly_its_name_is_suggested(name: str, meant: str) -> None:
    with pytest.raises(ModelError, match=f"did you mean '{meant}'"):
        resolve_base(name)


def test_a_wrong_hub_id_of_a_released_model_is_suggested_where_it_fails(monkeypatch) -> None:
    def refuse(repo: str, *_: object) -> None:
        raise ModelError(f"{repo}: no such model on the Hub")

    monkeypatch.setattr("sd3tune.model.base.resolve.download", refuse)
    with pytest.raises(ModelError, match=r"did you mean 'stabilityai/stable-diffusion-3.5-large'\?"):
        resolve_base("stabilityai/sd3.5-large")
    for right in ("stabilityai/stable-diffusion-3.5-large", "me/sd3.5-large"):
        with pytest.raises(ModelError, match=r"no such model on the Hub$"):
            resolve_base(right)
