"""What a user can get wrong: each case makes its own small world, and says what is typed there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sd3tune.model.base.resolve import resolve_base

YAML = """\
name: mistake
model: {base: tiny, max_sequence_length: 16}
method: {rank: 2, alpha: 2}
data:
  sources:
    - {path: photos, caption: a photo}
  resolution: 64
  cache_dir: store
train: {steps: 2}
"""
PROMPTLESS = "a photo, prior: {images: 9}}"
PREDICTION = "a photo, prior: {kind: prediction, prompt: a thing, images: 9}}"
NEGATIVE_PRIOR = "a photo, prior: {prompt: a thing, weight: -1}}"
SAME_PROMPTS = "a photo, prior: {prompt: [a thing, a toy, a thing]}}"
MORE_PROMPTS = "a photo, prior: {prompt: [a thing, a toy, a ball], images: 2}}"
NO_PROMPTS = "a photo, prior: {prompt: []}}"
OWN_CLASS = "a photo, prior: {prompt: a thing, images: 0, path: class}}"
TRAIN = ("train", "run.yaml")
CHECK = ("config", "check", "run.yaml")
PLAN = ("plan", "run.yaml")
SWEEP = ("sweep", "sweep.yaml")
INFER = ("infer", "--prompt", "a photo", "--steps", "1", "--no-before")


@dataclass(frozen=True)
class Case:
    """`prepare` works in a folder that holds `run.yaml` and `photos/`; `says` is part of what must be printed."""

    topic: str
    name: str
    command: Sequence[str]
    says: str
    prepare: Callable[[], object] = lambda: None
    environment: tuple[tuple[str, str], ...] = ()


def edited(old: str, new: str) -> Callable[[], object]:
    """run.yaml with one text in it replaced."""

    def prepare() -> None:
        assert old in YAML
        Path("run.yaml").write_text(YAML.replace(old, new))

    return prepare


def written(content: str | bytes, name: str = "run.yaml") -> Callable[[], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda: (Path(name).parent.mkdir(parents=True, exist_ok=True), Path(name).write_bytes(data))


def sweep(axes: str) -> Callable[[], object]:
    return written(f"config: run.yaml\n{axes}\n", "sweep.yaml")


def steps(*all_of_them: Callable[[], object]) -> Callable[[], object]:
    return lambda: [one() for one in all_of_them]


def finished_run() -> None:
    Path("done").mkdir()
    Path("done/run.json").write_text('{"sd3tune_run": 1, "report": {}}')
    Path("done/config.yaml").write_text(YAML)


def no_photos() -> None:
    for path in Path("photos").iterdir():
        path.unlink()


def mask_next_to_photo(size: tuple[int, int], value: int) -> Callable[[], object]:
    return lambda: Image.new("L", size, value).save("photos/0_mask.png")


def truncated_photo() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save("photos/cut.jpg")
    Path("photos/cut.jpg").write_bytes(Path("photos/cut.jpg").read_bytes()[:2000])


def parquet(*columns: str) -> Callable[[], object]:
    import pyarrow
    import pyarrow.parquet

    return lambda: pyarrow.parquet.write_table(pyarrow.table({column: ["x"] for column in columns}), "rows.parquet")


def base_copy(change: Callable[[Path], object]) -> Callable[[], object]:
    """A copy of the tiny base in `base/`, changed, and named by run.yaml."""

    def prepare() -> None:
        shutil.copytree(resolve_base("tiny").path, "base")
        change(Path("base"))
        edited("base: tiny", "base: ./base")()

    return prepare


def weights_changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    def of(base: Path) -> None:
        file = base / "transformer/diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return of


def cut_in_half(base: Path) -> None:
    file = base / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def config_changed(**values: object) -> Callable[[Path], object]:
    def of(base: Path) -> None:
        file = base / "transformer/config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return of


def pickled(base: Path) -> None:
    (base / "vae/diffusion_pytorch_model.safetensors").rename(base / "vae/diffusion_pytorch_model.bin")


def adapter(tensors: dict[str, torch.Tensor], **metadata: str) -> Callable[[], object]:
    return lambda: save_file(tensors, "lora.safetensors", metadata or None)


def contract(text: str) -> Callable[[], object]:
    """A good adapter, but for what its metadata says."""
    return adapter(pair("transformer_blocks.0.attn.to_q"), sd3tune=text)


def peft_folder(text: str) -> Callable[[], object]:
    """Weights of rank 2 in a folder `lora.safetensors` as PEFT's, with that configuration beside them."""

    def prepare() -> None:
        Path("lora.safetensors").mkdir()
        tensors = {key.replace("transformer.", "base_model.model.", 1): value
                   for key, value in pair("transformer_blocks.0.attn.to_q").items()}  # fmt: skip
        save_file(tensors, "lora.safetensors/adapter_model.safetensors")
        Path("lora.safetensors/adapter_config.json").write_text(text)

    return prepare


def pair(module: str, width: int = 64, value: float = 1.0) -> dict[str, torch.Tensor]:
    a, b = torch.full((2, width), value), torch.full((width, 2), value)
    return {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}


T5_QUERY = "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"


def text_pair(layer: str, module: str = ".mlp.fc1") -> dict[str, torch.Tensor]:
    a, b = torch.ones(2, 64), torch.ones(64, 2)
    return {f"{layer}{module}.lora_A.weight": a, f"{layer}{module}.lora_B.weight": b}


def method(text: str) -> Callable[[], object]:
    return edited("method: {rank: 2, alpha: 2}", f"method: {{rank: 2, alpha: 2, {text}}}")


def source(text: str) -> Callable[[], object]:
    return edited("{path: photos, caption: a photo}", text)


def scratch(text: str = "", more: str = "") -> Callable[[], object]:
    """run.yaml, as it is, trains from scratch, with `text` in its model section and `more` for its source."""

    def prepare() -> None:
        changed = Path("run.yaml").read_text().replace("method: {rank: 2, alpha: 2}", "method: {kind: full}")
        changed = changed.replace("model: {", f"model: {{init: random, {text}")
        Path("run.yaml").write_text(changed.replace("a photo}", f"a photo{more}}}"))

    return prepare


def clip_in_a_file() -> None:
    shutil.copy(resolve_base("tiny").path / "text_encoder" / "model.safetensors", "clip_l.safetensors")
    encoders = "text_encoders: {clip_l: ./clip_l.safetensors}"
    changed = YAML.replace("method: {rank: 2, alpha: 2}", "method: {kind: full}")
    Path("run.yaml").write_text(changed.replace("base: tiny,", f"base: tiny, {encoders},"))


JXL = b"\xff\x0a" + bytes(40)
NO_CAPTION = source("{path: photos}")
NO_MASKS = steps(written("", "empty/notes.txt"), source("{path: photos, masks: empty}"))
LORA = ("--lora", "lora.safetensors", "--base", "tiny", "--size", "64")

begun_run = written('{"sd3tune_run": 1}', "run/run.json")
CASES = [
    Case("config", "a key that does not exist", CHECK, "did you mean 'rank'", edited("rank: 2,", "rnk: 2,")),
    Case("config", "a section that does not exist", CHECK, "did you mean 'model'", edited("model:", "modle:")),
    Case("config", "a word for a number", CHECK, "'sixteen'", edited("rank: 2,", "rank: sixteen,")),
    Case("config", "true for a number", CHECK, "method.rank", edited("rank: 2,", "rank: true,")),
    Case("config", "a fractional number of steps", CHECK, "train.steps", edited("steps: 2", "steps: 1.5")),
    Case("config", "a number in quotes", CHECK, "train.steps", edited("steps: 2", 'steps: "10"')),
    Case("config", "a negative number of steps", CHECK, "-5", edited("steps: 2", "steps: -5")),
    Case("config", "a resolution off the grid", CHECK, "multiple of 16", edited("resolution: 64", "resolution: 100")),
    Case("config", "a size twice", CHECK, "more than once", edited("resolution: 64", "resolution: [64, 64]")),
    Case("config", "a share for no concept", CHECK, "'cat'", edited("resolution: 64", "balance: {cat: 2}")),
    Case("config", "a learning rate of zero", CHECK, "optimizer.lr", written(YAML + "optimizer: {lr: 0}\n")),
    Case("config", "an invalid learning rate", CHECK, "optimizer.lr", written(YAML + "optimizer: {lr: fast}\n")),
    Case("config", "not a number", CHECK, "optimizer.lr", written(YAML + "optimizer: {lr: .nan}\n")),
    Case("config", "three betas", CHECK, "optimizer.betas", written(YAML + "optimizer: {betas: [0.9, 0.99, 0.999]}\n")),
    Case("config", "a method that does not exist", CHECK, "'ia3'", edited("rank: 2,", "kind: ia3, rank: 2,")),
    Case(
        "config",
        "a key of another kind",
        CHECK,
        "mean",
        written(YAML + "flow: {timesteps: {kind: uniform, mean: 1}}\n"),
    ),
    Case("config", "a key twice", CHECK, "train", written(YAML + "train: {steps: 3}\n")),
    Case("config", "YAML that does not parse", CHECK, "run.yaml:", written(YAML + "optimizer: {lr: 1\n")),
    Case("config", "a tab", CHECK, "run.yaml:", written(YAML + "optimizer:\n\tlr: 1\n")),
    Case("config", "a Python tag", CHECK, "run.yaml:", written(YAML + "optimizer: !!python/object:os.system {}\n")),
    Case("config", "an empty file", CHECK, "is empty", written("")),
    Case("config", "a list instead of keys", CHECK, "run.yaml:1", written("- name\n")),
    Case("config", "a file that is not there", ("config", "check", "rn.yaml"), "did you mean run.yaml"),
    Case("config", "a folder", ("config", "check", "photos"), "is a folder"),
    Case("config", "a picture", ("config", "check", "photos/0.png"), "binary"),
    Case("config", "another encoding", CHECK, "UTF-8", written(YAML.encode() + b"# caf\xe9\n")),
    Case("config", "UTF-16 without its mark", CHECK, "looks like UTF-16", written(YAML.encode("utf-16-le"))),
    Case("config", "a newer version", CHECK, "upgrade", written(YAML + "config_version: 99\n")),
    Case("config", "no data", CHECK, "data", written("name: mistake\n")),
    Case("config", "no sources", CHECK, "data.sources", written("data: {sources: []}\n")),
    Case("config", "a name with a slash", CHECK, "name", edited("name: mistake", "name: a/b")),
    Case(
        "config",
        "a schedule for an optimizer that needs none",
        CHECK,
        "schedule.kind=constant",
        written(YAML + "optimizer: {kind: schedulefree}\nschedule: {kind: cosine}\n"),
    ),
    Case(
        "config",
        "a mixture with a share too few",
        CHECK,
        "shares",
        written(YAML + "flow: {timesteps: {kind: mixture, shares: [1]}}\n"),
    ),
    Case(
        "config",
        "a preview of an odd size",
        CHECK,
        "multiples of 16",
        written(YAML + "preview: {prompts: [{prompt: a dog, size: 1000}]}\n"),
    ),
    Case("config", "a warm-up as long as the run", CHECK, "warmup", written(YAML + "schedule: {warmup_steps: 2}\n")),
    Case("config", "a prior without a prompt", CHECK, "prior.prompt: missing", edited("a photo}", PROMPTLESS)),
    Case("config", "class images in a prior that has none", CHECK, "kind images", edited("a photo}", PREDICTION)),
    Case("config", "no prompt for the class", CHECK, "prior.prompt", edited("a photo}", NO_PROMPTS)),
    Case("config", "a prompt for the class twice", CHECK, "'a thing'", edited("a photo}", SAME_PROMPTS)),
    Case("config", "more prompts than class images", CHECK, "3 prompts", edited("a photo}", MORE_PROMPTS)),
    Case("config", "a negative prior weight", CHECK, "prior.weight", edited("a photo}", NEGATIVE_PRIOR)),
    Case("config", "half an image held out", CHECK, "holdout", written(YAML + "validation: {holdout: 0.5}\n")),
    Case("config", "no targets", CHECK, "method.targets", method("targets: []")),
    Case("config", "a start that changes the base", CHECK, "pissa", method("init: pissa")),
    Case("config", "no text encoder to train", CHECK, "names no encoder", method("text_encoders: {}")),
    Case(
        "config",
        "a token in no caption",
        TRAIN,
        "is in no caption",
        edited("{rank: 2, alpha: 2}", "{kind: textual_inversion, token: <rex>, init: dog}"),
    ),
    Case("config", "T5 to train", CHECK, "t5: unknown key", method("text_encoders: {t5: {}}")),
    Case(
        "config",
        "text encoders updated in the backward pass",
        (*CHECK, "train.fused_backward=true", "train.max_grad_norm=null"),
        "learning rates of their own",
        method("text_encoders: {clip_l: {}}"),
    ),
    Case("config", "an EMA that never moves", CHECK, "ema.decay", written(YAML + "ema: {decay: 1.5}\n")),
    Case("config", "too many T5 tokens", CHECK, "max_sequence_length", edited("h: 16}", "h: 1000}")),
    Case(
        "config",
        "cosmap twice",
        CHECK,
        "cosmap",
        written(YAML + "flow: {timesteps: {kind: cosmap}, weighting: {kind: cosmap}}\n"),
    ),
    Case(
        "config", "a rank for the whole model", CHECK, "kind lora", edited("rank: 2, alpha: 2", "kind: full, rank: 2")
    ),
    Case(
        "config",
        "a precision that files do not have",
        CHECK,
        "export_dtype",
        edited("rank: 2, alpha: 2", "kind: full, export_dtype: fp8"),
    ),
    Case(
        "config",
        "checkpointed blocks without checkpointing",
        CHECK,
        "leave checkpointed_blocks out",
        edited("steps: 2", "steps: 2, checkpointed_blocks: 1"),
    ),
    Case(
        "config",
        "more blocks than there are",
        PLAN,
        "at most 4",
        edited("steps: 2", "steps: 2, gradient_checkpointing: block, checkpointed_blocks: 9"),
    ),
    Case(
        "config",
        "more blocks to swap than there are",
        PLAN,
        "null for none",
        edited("steps: 2", "steps: 2, swap_blocks: 9"),
    ),
    Case(
        "config",
        "trained blocks to swap",
        CHECK,
        "leave train.swap_blocks out",
        lambda: Path("run.yaml").write_text(
            YAML.replace("steps: 2", "steps: 2, swap_blocks: 3").replace("{rank: 2, alpha: 2}", "{kind: full}")
        ),
    ),
    Case(
        "config",
        "an adapter that needs the rows of a base in 4 bits",
        CHECK,
        "set model.quantize=int8",
        lambda: Path("run.yaml").write_text(
            YAML.replace("16}", "16, quantize: nf4}").replace("{rank: 2, alpha: 2}", "{kind: lokr}")
        ),
    ),
    Case(
        "config",
        "a budget without automatic ranks",
        CHECK,
        "set both",
        edited("rank: 2, alpha: 2", "rank: 2, budget_mb: 5"),
    ),
    Case(
        "config",
        "a budget below rank 1",
        PLAN,
        "raise it",
        edited("rank: 2, alpha: 2", "rank: auto, budget_mb: 0.001"),
    ),
    Case(
        "config",
        "a fused update of a clipped gradient",
        CHECK,
        "leave fused_backward out",
        edited("steps: 2", "steps: 2, fused_backward: true"),
    ),
    Case(
        "config",
        "a fused update by an optimizer that needs the whole gradient",
        CHECK,
        "leave train.fused_backward out",
        lambda: Path("run.yaml").write_text(
            YAML.replace("steps: 2", "steps: 2, fused_backward: true, max_grad_norm: null")
            + "optimizer: {kind: prodigy}\n"
        ),
    ),
    Case(
        "config",
        "memory that is not a number",
        CHECK,
        "train.memory",
        edited("steps: 2", "steps: 2, memory: much"),
    ),
    Case(
        "config",
        "too little memory",
        PLAN,
        "cannot hold this run",
        edited("steps: 2", "steps: 2, memory: 0.5"),
    ),
    Case(
        "config",
        "a trained base in 4 bits",
        CHECK,
        "only a frozen base",
        lambda: Path("run.yaml").write_text(
            YAML.replace("16}", "16, quantize: nf4}").replace("{rank: 2, alpha: 2}", "{kind: full}")
        ),
    ),
    Case(
        "config",
        "tags in a whole model",
        CHECK,
        "leave data.export_tags out",
        lambda: Path("run.yaml").write_text(
            YAML.replace("data:", "data:\n  export_tags: true").replace("{rank: 2, alpha: 2}", "{kind: full}")
        ),
    ),
    Case("config", "an adapter for random weights", CHECK, "nothing to adapt", edited("tiny,", "tiny, init: random,")),
    Case("config", "a shape for old weights", CHECK, "init", edited("tiny,", "tiny, transformer: {num_layers: 2},")),
    Case("config", "a shape with a misspelt key", CHECK, "num_layers", scratch("transformer: {num_layer: 2},")),
    Case(
        "config",
        "a prior of random weights",
        CHECK,
        "data.sources.0.prior",
        scratch(more=", prior: {kind: prediction, prompt: a thing}"),
    ),
    Case("config", "two problems at once", CHECK, "method.rank", edited("rank: 2, alpha: 2", "rank: 0, alpha: -1")),
    Case("config", "a parent that is not there", CHECK, "base.yaml", written("extends: base.yaml\n" + YAML)),
    Case(
        "config",
        "parents in a circle",
        CHECK,
        "circle",
        steps(written("extends: b.yaml\n" + YAML), written("extends: run.yaml\n", "b.yaml")),
    ),
    Case("config", "an override without =", (*CHECK, "train.steps"), "train.steps"),
    Case("config", "an override of nothing", (*CHECK, "train.step=3"), "did you mean"),
    Case("config", "an override below a number", (*CHECK, "train.steps.x=3"), "train.steps"),
    Case("config", "an override of a wrong type", (*CHECK, "train.steps=abc"), "train.steps=abc"),
    Case("config", "an override that does not parse", (*CHECK, "data={"), "data={"),
    Case("config", "a NUL for the model card", CHECK, "NUL", edited("train:", 'hub: {description: "a\\0"}\ntrain:')),
    Case("config", "an axis that is no key", SWEEP, "did you mean 'lr'", sweep("axes: {optimizer.rl: [1.0e-4]}")),
    Case("config", "an endless grid", SWEEP, "a grid needs a step", sweep("axes: {optimizer.lr: {low: 0, high: 1}}")),
    Case("config", "a sweep of what is not measured", SWEEP, "validation.holdout", sweep("axes: {method.rank: [2]}")),
    Case("data", "all photos held out", TRAIN, "none to train on", written(YAML + "validation: {holdout: 99}\n")),
    Case(
        "data",
        "a folder to hold out that is not there",
        TRAIN,
        "validation.holdout",
        written(YAML + "validation: {holdout: others}\n"),
    ),
    Case("data", "class images wanted, none given and none to be drawn", TRAIN, "prior", edited("a photo}", OWN_CLASS)),
    Case(
        "data",
        "a class image that is text",
        TRAIN,
        "class/dog.png",
        steps(edited("a photo}", OWN_CLASS), written("a dog", "class/dog.png")),
    ),
    Case("data", "a size for no photo", TRAIN, "too small", edited("resolution: 64", "resolution: [64, 512]")),
    Case("data", "a folder that is not there", TRAIN, "no such folder", source("{path: fotos, caption: a}")),
    Case("data", "a file for a folder", TRAIN, "is a file", source("{path: photos/0.png, caption: a}")),
    Case("data", "a folder to caption that is not there", ("data", "caption", "fotos"), "name the folder"),
    Case("data", "a captioning model that is not there", ("data", "caption", "photos", "--model", "./gone"), "./gone"),
    Case("data", "a mask of nothing", ("data", "mask", "photos", "--prompt", " "), "--prompt"),
    Case(
        "data", "a threshold of 2", ("data", "mask", "photos", "--prompt", "dog", "--threshold", "2"), "--threshold 2"
    ),
    Case("data", "an empty folder", TRAIN, "no images", no_photos),
    Case(
        "data",
        "pictures in subfolders only",
        TRAIN,
        "such as",
        steps(
            lambda: Path("photos").rename("more"), lambda: Path("photos").mkdir(), lambda: shutil.move("more", "photos")
        ),
    ),
    Case("data", "text that is called .png", TRAIN, "text.png", written("hello", "photos/text.png")),
    Case(
        "data",
        "a photo that is a Git LFS pointer",
        TRAIN,
        "git lfs pull",
        written("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "photos/a.jpg"),
    ),
    Case("data", "a photo that is a web page", TRAIN, "HTML", written("<!DOCTYPE html>\n<html>", "photos/a.jpg")),
    Case("data", "a JPEG XL that is called .jpg", TRAIN, "JPEG XL", written(JXL, "photos/a.jpg")),
    Case("data", "JPEG XLs only", TRAIN, "IMG_1.jxl", steps(no_photos, written(JXL, "photos/IMG_1.jxl"))),
    Case("data", "an empty image", TRAIN, "empty", written("", "photos/nothing.png")),
    Case("data", "a photo that breaks off", TRAIN, "cut.jpg", truncated_photo),
    Case("data", "no caption", TRAIN, "0.png: has no caption", NO_CAPTION),
    Case("data", "an empty caption", TRAIN, "is empty", steps(NO_CAPTION, written("", "photos/0.txt"))),
    Case(
        "data", "a mask of another shape", TRAIN, "0_mask.png: the mask is 64 x 64", mask_next_to_photo((64, 64), 255)
    ),
    Case("data", "a black mask", TRAIN, "0_mask.png: the mask has no inside", mask_next_to_photo((80, 64), 0)),
    Case("data", "a folder without masks", TRAIN, "has no mask for any", NO_MASKS),
    Case("data", "a folder of masks that is not there", TRAIN, "of masks", source("{path: photos, masks: m}")),
    Case("data", "kohya's layout without its folders", TRAIN, "10_sks dog", source("{path: photos, layout: kohya}")),
    Case(
        "data",
        "unequal numbers of captions",
        TRAIN,
        "2 in text_t5",
        steps(
            written("a\nb\nc", "photos/0.txt"),
            written("A.\nB.", "photos/0.t5.txt"),
            source("{path: photos, captions: lines}"),
        ),
    ),
    Case(
        "data",
        "a caption in UTF-16 without its mark",
        TRAIN,
        "looks like UTF-16",
        steps(NO_CAPTION, written("a dog".encode("utf-16-le"), "photos/0.txt")),
    ),
    Case(
        "data",
        "a NUL in the metadata",
        TRAIN,
        "holds NUL",
        written('{"file_name": "0.png", "text": "a\\u0000"}\n', "photos/metadata.jsonl"),
    ),
    Case("data", "a caption in another encoding", TRAIN, "0.txt", written(b"caf\xe9", "photos/0.txt")),
    Case(
        "data",
        "a photo that is all width",
        TRAIN,
        "too narrow",
        lambda: Image.new("RGB", (4000, 20)).save("photos/line.png"),
    ),
    Case(
        "data",
        "metadata for a missing file",
        TRAIN,
        "metadata.jsonl:1",
        written('{"file_name": "gone.png", "text": "a"}\n', "photos/metadata.jsonl"),
    ),
    Case(
        "data",
        "metadata that leaves the folder",
        TRAIN,
        "metadata.jsonl:1",
        written('{"file_name": "../run.yaml", "text": "a"}\n', "photos/metadata.jsonl"),
    ),
    Case("data", "metadata that does not parse", TRAIN, "metadata.jsonl:1", written("{", "photos/metadata.jsonl")),
    Case(
        "data",
        "two kinds of metadata",
        TRAIN,
        "metadata",
        steps(
            written('{"file_name": "0.png", "text": "a"}\n', "photos/metadata.jsonl"),
            written("file_name,text\n0.png,a\n", "photos/metadata.csv"),
        ),
    ),
    Case(
        "data",
        "columns of other names",
        TRAIN,
        "image_column",
        steps(parquet("picture", "text"), source("{kind: dataset, path: ./rows.parquet}")),
    ),
    Case("data", "a dataset that is not there", TRAIN, "gone.parquet", source("{kind: dataset, path: ./gone.parquet}")),
    Case("data", "a placeholder that does not exist", CHECK, "template", source('{path: photos, template: "{word}"}')),
    Case("models", "a released model by another name", TRAIN, "3.5-medium'", edited("base: tiny,", "base: sd3.5-m,")),
    Case("models", "a misspelt base", TRAIN, "did you mean 'tiny", edited("base: tiny,", "base: tiny-sd35,")),
    Case("models", "a folder without a model", TRAIN, "model_index.json", edited("base: tiny,", "base: ./photos,")),
    Case("models", "a component that is missing", TRAIN, "vae", base_copy(lambda base: shutil.rmtree(base / "vae"))),
    Case("models", "pickled weights", TRAIN, "pickled", base_copy(pickled)),
    Case("models", "more blocks than any SD3 has", TRAIN, "num_layers", base_copy(config_changed(num_layers=10**9))),
    Case("models", "a list for a number", TRAIN, "num_layers", base_copy(config_changed(num_layers=[1]))),
    Case("models", "a fractional width", TRAIN, "out_channels", base_copy(config_changed(out_channels=1.5))),
    Case(
        "models",
        "an adapter inside the base",
        TRAIN,
        "adapter_config.json",
        base_copy(lambda base: (base / "text_encoder/adapter_config.json").write_text("{}")),
    ),
    Case("models", "a file cut short", TRAIN, "truncated", base_copy(cut_in_half)),
    Case(
        "models",
        "NaN inside",
        TRAIN,
        "NaN",
        base_copy(weights_changed(lambda tensors: tensors["proj_out.weight"].fill_(torch.nan))),
    ),
    Case(
        "models",
        "a tensor of another shape",
        TRAIN,
        "proj_out.weight",
        base_copy(weights_changed(lambda t: t.update({"proj_out.weight": torch.zeros(3, 3)}))),
    ),
    Case(
        "models",
        "a tensor that is missing",
        TRAIN,
        "proj_out.weight",
        base_copy(weights_changed(lambda tensors: tensors.pop("proj_out.weight"))),
    ),
    Case(
        "models",
        "a single file of something else",
        TRAIN,
        "lora.safetensors",
        steps(adapter(pair("x")), edited("base: tiny,", "base: ./lora.safetensors,")),
    ),
    Case(
        "models",
        "a checkpoint in a pickle",
        TRAIN,
        "model.ckpt",
        steps(written(b"x", "model.ckpt"), edited("base: tiny,", "base: ./model.ckpt,")),
    ),
    Case(
        "models",
        "more pixels than the base can place",
        TRAIN,
        "too large",
        edited("resolution: 64", "resolution: 4096"),
    ),
    Case("models", "latents of another VAE", TRAIN, "in_channels", scratch("transformer: {in_channels: 4},")),
    Case("models", "text of another width", TRAIN, "joint", scratch("transformer: {joint_attention_dim: 4096},")),
    Case(
        "models", "pooled text of another width", TRAIN, "pooled", scratch("transformer: {pooled_projection_dim: 9},")
    ),
    Case(
        "models",
        "a second attention in a missing block",
        TRAIN,
        "9",
        scratch("transformer: {dual_attention_layers: [9]},"),
    ),
    Case(
        "models",
        "neither a transformer nor its shape",
        TRAIN,
        "num_layers",
        steps(base_copy(lambda base: shutil.rmtree(base / "transformer")), scratch()),
    ),
    Case("models", "a whole model with an encoder from a file", TRAIN, "method.kind=full", clip_in_a_file),
    Case("models", "targets that match nothing", TRAIN, "attn.to_z", method("targets: [attn.to_z]")),
    Case(
        "models",
        "a target that cannot learn",
        TRAIN,
        "add_q_proj",
        method("targets: [transformer_blocks.3.attn.add_q_proj]"),
    ),
    Case("models", "a block that does not exist", TRAIN, "out of range", method("blocks: [99]")),
    Case("models", "a rank for nothing", TRAIN, "rank_pattern", method("rank_pattern: {to_z: 4}")),
    Case("models", "an offline base of another name", ("base", "path", "small"), "tiny"),
    Case("adapters", "an adapter that is not there", (*INFER, "--lora", "gone", "--base", "tiny"), "gone"),
    Case("adapters", "a start that is not there", TRAIN, "gone", method("start_from: ./gone")),
    Case(
        "adapters",
        "a file that is not an adapter",
        (*INFER, *LORA),
        "safetensors",
        written("hello", "lora.safetensors"),
    ),
    Case("adapters", "an adapter without tensors", (*INFER, *LORA), "lora.safetensors", adapter({})),
    Case(
        "adapters",
        "an adapter of text encoders",
        (*INFER, *LORA),
        "text encoders",
        adapter({"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(4, 2)}),
    ),
    Case(
        "adapters",
        "an adapter of text encoders, too",
        (*INFER, *LORA),
        "--transformer-only",
        adapter({**pair("transformer_blocks.0.attn.to_q"), "text_encoder.x.lora_A.weight": torch.ones(4, 2)}),
    ),
    Case(
        "adapters",
        "a start of text encoders, too",
        TRAIN,
        "`sd3tune lora convert",
        steps(
            adapter({**pair("transformer_blocks.0.attn.to_q"), "bundle_emb.sks.clip_l": torch.ones(4, 2)}),
            method("start_from: ./lora.safetensors"),
        ),
    ),
    Case(
        "adapters",
        "a start of a text encoder that is frozen",
        TRAIN,
        "set method.text_encoders.clip_l",
        steps(
            adapter(
                {**pair("transformer_blocks.0.attn.to_q"), **text_pair("text_encoder.text_model.encoder.layers.0")}
            ),
            method("start_from: ./lora.safetensors"),
        ),
    ),
    Case(
        "adapters",
        "T5 for diffusers",
        ("lora", "convert", "lora.safetensors", "--to", "diffusers", "--out", "new.safetensors"),
        "diffusers loads no LoRA of T5",
        adapter({**pair("transformer_blocks.0.attn.to_q"), **text_pair(T5_QUERY, "")}),
    ),
    Case(
        "adapters",
        "another base's text encoders to be merged",
        ("lora", "merge", "lora.safetensors", "--into-base", "--base", "tiny", "--out", "new"),
        "made for another base: text_model.encoder.layers.0.mlp.fc1 is",
        adapter({**pair("transformer_blocks.0.attn.to_q"), **text_pair("text_encoder.text_model.encoder.layers.0")}),
    ),
    Case(
        "adapters",
        "a LoKr of which a part is missing",
        (*INFER, *LORA),
        "lokr_w2 is not complete",
        adapter({"transformer.transformer_blocks.0.attn.to_q.lokr_w1": torch.ones(8, 8)}),
    ),
    Case(
        "adapters",
        "an embedding for another model",
        (*INFER, "--embedding", "lora.safetensors"),
        "must be clip_l and clip_g",
        adapter({"emb_params": torch.ones(2, 64)}),
    ),
    Case("adapters", "DoRA of PEFT", (*INFER, *LORA), "use_dora", peft_folder('{"r": 2, "use_dora": true}')),
    Case(
        "adapters",
        "a pattern that could run for hours",
        (*INFER, *LORA),
        "regular expression",
        peft_folder('{"r": 2, "alpha_pattern": {"(a+)+$": 4}}'),
    ),
    Case("adapters", "the configuration of another", (*INFER, *LORA), "states rank 8", peft_folder('{"r": 8}')),
    Case("adapters", "a configuration cut off", (*INFER, *LORA), "adapter_config.json is not", peft_folder('{"r": ')),
    Case(
        "adapters",
        "a module that SD3 lacks",
        (*INFER, *LORA),
        "no module",
        adapter({"lora_unet_joint_blocks_0_x.lora_up.weight": torch.ones(4, 2)}),
    ),
    Case("adapters", "modules of another model", (*INFER, *LORA), "no effect", adapter(pair("single_blocks.0.proj"))),
    Case(
        "adapters",
        "another width",
        (*INFER, *LORA),
        "made for another base",
        adapter(pair("transformer_blocks.0.attn.to_q", 96)),
    ),
    Case(
        "adapters",
        "NaN in an adapter",
        (*INFER, *LORA),
        "NaN",
        adapter(pair("transformer_blocks.0.attn.to_q", value=torch.nan)),
    ),
    Case(
        "adapters",
        "half a pair",
        (*INFER, *LORA),
        "pair",
        adapter(dict(list(pair("transformer_blocks.0.attn.to_q").items())[:1])),
    ),
    Case(
        "adapters",
        "an adapter without a base",
        (*INFER, "--lora", "lora.safetensors"),
        "--base",
        adapter(pair("transformer_blocks.0.attn.to_q")),
    ),
    Case("adapters", "a contract that is not JSON", (*INFER, *LORA), "'sd3tune'", contract("{")),
    Case("adapters", "a contract that is a list", (*INFER, *LORA), "'sd3tune'", contract("[1]")),
    Case("adapters", "a word for a number inside", (*INFER, *LORA), "resolution", contract('{"resolution": "big"}')),
    Case("adapters", "a size off the grid inside", (*INFER, *LORA), "resolution", contract('{"resolution": 100}')),
    Case("adapters", "an unknown quantisation", (*INFER, *LORA), "quantize", contract('{"quantize": "evil"}')),
    Case(
        "adapters",
        "an alpha beyond all numbers",
        (*INFER, *LORA),
        "infinite",
        adapter(
            pair("transformer_blocks.0.attn.to_q"), lora_adapter_metadata=json.dumps({"transformer.lora_alpha": 1e300})
        ),
    ),
    Case(
        "adapters",
        "an encoder that does not exist",
        (*INFER, *LORA),
        "encoders",
        contract('{"encoders": ["clip_l", 3]}'),
    ),
    Case(
        "adapters",
        "a contract without a base",
        (*INFER, *LORA),
        "base: missing",
        contract('{"base_fingerprint": "ab"}'),
    ),
    Case("adapters", "a later contract", (*INFER, *LORA), "newer", contract('{"contract_version": 9}')),
    Case(
        "adapters",
        "an invalid version",
        (*INFER, *LORA),
        "contract_version",
        contract('{"contract_version": "v1"}'),
    ),
    Case(
        "adapters",
        "an invalid alpha",
        (*INFER, *LORA),
        "lora_alpha",
        adapter(pair("transformer_blocks.0.attn.to_q"), lora_adapter_metadata='{"transformer.lora_alpha": "two"}'),
    ),
    Case("adapters", "a weight that is not a number", (*INFER, "--lora", "lora.safetensors@much"), "much"),
    Case(
        "adapters",
        "a weight after a colon",
        (*INFER, "--lora", "lora.safetensors:0.8"),
        "write lora.safetensors@0.8",
        adapter(pair("transformer_blocks.0.attn.to_q")),
    ),
    Case("adapters", "neither adapter nor base", INFER, "--lora"),
    Case("flags", "a size off the grid", (*INFER, "--base", "tiny", "--size", "100"), "multiples of 16"),
    Case("flags", "an invalid size", (*INFER, "--base", "tiny", "--size", "big"), "--size big"),
    Case("flags", "a size beyond the base", (*INFER, "--base", "tiny", "--size", "8192"), "at most"),
    Case("flags", "no images", (*INFER, "--base", "tiny", "--num", "0"), "--num 0"),
    Case("flags", "a negative seed", (*INFER, "--base", "tiny", "--seed", "-1"), "--seed -1"),
    Case("flags", "a precision that does not exist", (*INFER, "--base", "tiny", "--dtype", "int8"), "int8"),
    Case(
        "flags", "a sampler that does not exist", (*INFER, "--base", "tiny", "--sampler", "ddim"), "euler, heun, dpmpp"
    ),
    Case("flags", "a shift of zero", (*INFER, "--base", "tiny", "--shift", "0"), "--shift 0"),
    Case("flags", "no text to draw", ("infer", "--base", "tiny"), "give --prompt"),
    Case("flags", "prompts from two places", (*INFER, "--base", "tiny", "--prompts", "p.csv"), "leave one of the two"),
    Case(
        "flags",
        "a column that does not exist",
        ("infer", "--base", "tiny", "--prompts", "p.csv"),
        "p.csv:2: sead: unknown column; did you mean 'seed'",
        written("prompt,sead\na dog,1\n", "p.csv"),
    ),
    Case("flags", "a grid over nothing known", (*INFER, "--base", "tiny", "--grid", "wieght=0,1"), "'weight'"),
    Case("flags", "a grid of weights without an adapter", (*INFER, "--base", "tiny", "--grid", "weight=0,1"), "--lora"),
    Case("flags", "a picture without a recipe", ("infer", "--from", "photos/0.png"), "holds no recipe"),
    Case(
        "flags",
        "a start image that is not a picture",
        (*INFER, "--base", "tiny", "--image", "run.yaml", "--strength", "1"),
        "is not an image",
    ),
    Case("flags", "strength without a picture", (*INFER, "--base", "tiny", "--strength", "0.5"), "--image"),
    Case("flags", "a mask without a picture", (*INFER, "--base", "tiny", "--mask", "photos/0.png"), "give both"),
    Case("flags", "layers that are words", (*INFER, "--base", "tiny", "--slg", "2", "--slg-layers", "all"), "7,8,9"),
    Case("flags", "layers beyond the base", (*INFER, "--base", "tiny", "--slg", "2"), "this base has the blocks"),
    Case("flags", "too many tokens for T5", (*INFER, "--base", "tiny", "--t5-tokens", "999"), "from 1 to 512"),
    Case(
        "flags", "a form of weights that does not exist", (*INFER, "--base", "tiny", "--quantize", "fp4"), "nf4, int8"
    ),
    Case(
        "flags",
        "processes within processes",
        (*TRAIN, "--num-processes", "2"),
        "launcher",
        environment=(("WORLD_SIZE", "2"),),
    ),
    Case("hub", "an upload to nowhere", CHECK, "repo_id is null", written(YAML + "hub: {push: end}\n")),
    Case("hub", "a repository without its owner", CHECK, "hub.repo_id", written(YAML + "hub: {repo_id: dog}\n")),
    Case("hub", "a push of another folder", ("hub", "push", "photos"), "run.json"),
    Case("hub", "a push of another program's folder", ("hub", "push", "x"), "of sd3tune", written("{}", "x/run.json")),
    Case(
        "hub",
        "a push of half a run",
        ("hub", "push", "half"),
        "has not finished",
        written('{"sd3tune_run": 1}', "half/run.json"),
    ),
    Case("hub", "a push to nowhere", ("hub", "push", "done"), "--repo-id", finished_run),
    Case("hub", "a push to an invalid repository", ("hub", "push", "done", "--repo-id", "dog"), "'dog'", finished_run),
    Case("runs", "a report on another folder", ("report", "photos"), "not a run folder"),
    Case("runs", "a report written to a folder", ("report", "run", "--out", "photos"), "is a folder", begun_run),
    Case("runs", "a comparison of a run with itself", ("report", "run", "run/"), "named twice", begun_run),
    Case("runs", "a list of a folder that is not there", ("runs", "missing"), "no such folder"),
    Case("flags", "a run folder that is a file", (*TRAIN, "output_dir=photos/0.png"), "is a file"),
    Case("flags", "a run folder full of other things", (*TRAIN, "output_dir=photos"), "not empty"),
    Case(
        "flags",
        "a folder with the run.json of another program",
        (*TRAIN, "output_dir=other"),
        "not a run folder",
        written('{"tool": "other"}', "other/run.json"),
    ),
    Case("flags", "a run folder that cannot be made", (*TRAIN, "output_dir=/proc/run"), "/proc/run"),
    Case("flags", "a store that cannot be made", (*TRAIN, "data.cache_dir=/proc/store"), "/proc/store"),
    Case("flags", "a card that is not known", (*PLAN, "--card", "4091"), "did you mean 4090?"),
    Case("flags", "a card without memory", (*PLAN, "--memory", "0"), "--memory 0"),
    Case("flags", "more than a card can do", (*PLAN, "--utilisation", "140"), "--utilisation 140"),
    Case("flags", "a precision that a card lacks", (*PLAN, "--card", "t4", "model.dtype=bf16"), "has no bf16"),
    Case("flags", "a page on a missing folder", ("ui", "missing"), "missing: no such folder"),
    Case("flags", "a page for the network without a password", ("ui", "--host", "0.0.0.0"), "needs a password"),
]
