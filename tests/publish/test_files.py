"""What of a folder is for others: every product, and beside it nothing."""

from __future__ import annotations

from pathlib import Path

from sd3tune.methods import products
from sd3tune.publish.files import ADAPTERS, EMBEDDINGS, MODELS, files_of_product, public_facts


def test_every_product_is_on_the_list() -> None:
    names = {name for product in products() for name in (product.name, product.raw)}
    assert names == {*ADAPTERS, *EMBEDDINGS, *MODELS}


def test_beside_a_product_nothing_goes_up(tmp_path: Path) -> None:
    ours = (
        "adapter/pytorch_lora_weights.safetensors", "model/model_index.json", "model/sd3tune.json",
        "model/tokenizer/merges.txt", "model/tokenizer_3/spiece.model",
        "model/transformer/diffusion_pytorch_model.safetensors",
    )  # fmt: skip
    others = (
        "adapter/notes.txt", "adapter/.tmp-1-pytorch_lora_weights.safetensors", "model/optimizer.bin",
        "state.safetensors", "model/.DS_Store", "checkpoints/step-000001/adapter/pytorch_lora_weights.safetensors",
        "logs/a.json", "best/a.json",
    )  # fmt: skip
    for name in (*ours, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "model" / "link.json").symlink_to("/etc/hostname")
    assert files_of_product(tmp_path) == {name: tmp_path / name for name in ours}


def test_of_run_json_only_known_facts_are_told_and_no_path() -> None:
    described = {
        "argv": ["sd3tune", "train", "/home/me/rex.yaml"], "warnings": ["/home/me/rex.png: small"], "seed": 1,
        "base": {"name": "/home/me/models/sd3", "revision": None}, "optimizer": {"reason": "/usr/lib/libcuda.so: none"},
    }  # fmt: skip
    assert public_facts(described) == {"seed": 1, "base": {"name": "sd3", "revision": None}}
