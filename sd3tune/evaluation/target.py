"""The target of an evaluation: a run, an adapter, a whole model, or a folder of pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sd3tune.adapter.embedding import find_embedding, is_embedding, read_embedding
from sd3tune.adapter.file import find_adapter
from sd3tune.adapter.hub import load_adapter
from sd3tune.adapter.metadata import is_safetensors
from sd3tune.config import Config, load_config
from sd3tune.config.run_folder import CONFIG_FILE, is_run_folder, read_run_file
from sd3tune.data.sources.folder import images_in
from sd3tune.errors import AdapterError, RunError
from sd3tune.invocation import command_line
from sd3tune.methods import products
from sd3tune.methods.base import Product
from sd3tune.model.base.parts import INDEX_FILE
from sd3tune.publish.card.evaluated import EVAL_FOLDER
from sd3tune.publish.files import ADAPTERS, EMBEDDINGS
from sd3tune.run.folder import BEST, MEASURED
from sd3tune.run.previews import run_of, step_of
from sd3tune.training.checkpoint import list_checkpoints, read_state


@dataclass(frozen=True)
class Weights:
    """The weights of one row: an adapter, or a whole model."""

    name: str
    step: int | None
    path: Path
    """Location of the adapter or embedding, as for `infer`, or the folder of the model."""
    option: str = "--lora"
    """The option of `infer` that takes it: `--lora`, `--embedding` or `--base`."""


@dataclass(frozen=True)
class Target:
    """What is evaluated."""

    name: str
    weights: Sequence[Weights] = ()
    """Oldest step first; empty for a folder of pictures."""
    pictures: Path | None = None
    """A folder of pictures that are measured as they are."""
    run: Path | None = None
    config: Config | None = None
    """The configuration of the run, or of the run that the adapter belongs to."""
    contract: Mapping[str, Any] = field(default_factory=dict)
    """The contract of an adapter or embedding outside a run."""

    @property
    def default_out(self) -> Path:
        return (
            self.run / EVAL_FOLDER if self.run else Path(EVAL_FOLDER) / re.sub(r"[^\w.-]+", "-", self.name).strip("-.")
        )


def find_target(location: str, checkpoints: str) -> Target:
    """Return the target at `location`. Raises UserError if there is none, or if it holds no weights."""
    path = Path(location).expanduser()
    if is_run_folder(path) or (read_run_file(path) and (path / CONFIG_FILE).is_file()):
        return _run(path, checkpoints)
    if checkpoints != "last":
        raise RunError(f"--checkpoints {checkpoints}: {location} is no run folder, so it has no checkpoints")
    if (path / INDEX_FILE).is_file():
        return _model(path)
    if is_embedding(path):
        return _embedding(find_embedding(path))
    if path.is_file() or _holds_adapter(path):
        return _adapter(find_adapter(path))
    if not path.exists():
        return _on_the_hub(location)
    if path.is_dir() and any(images_in(path)):
        return Target(path.resolve().name, pictures=path)
    raise RunError(f"{location}: holds no run, no adapter, no model and no pictures")


def _holds_adapter(folder: Path) -> bool:
    """Return True for a folder with an adapter, or with several, of which `find_adapter` then asks to name one."""
    inside = [*folder.glob("*"), *folder.glob("adapter/*")] if folder.is_dir() else []
    return any(is_safetensors(path.name) and path.is_file() for path in inside)


def _on_the_hub(location: str) -> Target:
    path = Path(location)
    missing = f"{location}: no such run, adapter or folder"
    if path.parent.is_dir() or len(path.parts) != 2:
        raise RunError(missing)
    try:
        adapter = load_adapter(path)
    except AdapterError as error:
        told = (problem.replace("give --lora a folder", "give a folder") for problem in error.problems)
        reasons = (problem.removeprefix(f"--lora {location}: ") for problem in told)
        raise AdapterError(*(f"{missing} here, nor a repository on the Hub: {reason}" for reason in reasons)) from None
    name = (adapter.origin or location).partition(":")[0]
    return Target(name, [Weights(name, None, path)], contract=adapter.contract)


def _run(run: Path, checkpoints: str) -> Target:
    config = load_config(run / CONFIG_FILE).config
    found: dict[int | None, Weights] = {}
    for folder in _folders(run) if checkpoints == "all" else [run]:
        product = next((product for product in products() if product.is_in(folder)), None)
        if product is not None:
            weights = _weights(run, folder, product)
            found[weights.step] = weights
    if not found:
        raise RunError(_no_weights(run))
    ordered = sorted(found.values(), key=lambda weights: (weights.step is None, weights.step or 0))
    return Target(config.name, ordered, run=run, config=config)


def _folders(run: Path) -> list[Path]:
    """Return the folders that may hold weights; of two with the same step, the later one counts."""
    return [*sorted((run / EVAL_FOLDER / MEASURED).glob("step-*")), run / BEST, *list_checkpoints(run), run]


def _weights(run: Path, folder: Path, product: Product) -> Weights:
    option = {ADAPTERS[0]: "--lora", EMBEDDINGS[0]: "--embedding"}.get(product.name, "--base")
    path = folder / product.name if option == "--base" else folder
    step = _step(run, folder)
    name = (folder.name if folder != run else product.name) if step is None else f"step {step}"
    return Weights(name, step, path, option)


def _step(run: Path, folder: Path) -> int | None:
    """Return the step of the weights in a folder of the run; None if the run does not say."""
    named = re.fullmatch(r"step-(\d+)", folder.name)
    if named and folder != run:
        return int(named[1])
    try:
        return step_of((folder / "adapter" / "file").absolute(), run.absolute())
    except (OSError, ValueError, LookupError):
        return None


def _no_weights(run: Path) -> str:
    saved = list_checkpoints(run)
    resume = command_line("sd3tune", "train", str(run / CONFIG_FILE), "--resume")
    if not saved:
        return f"{run}: holds no trained weights yet; finish the run with `{resume}`"
    step = read_state(saved[-1])["step"]
    return (
        f"{run}: has not finished, and is at step {step}; finish it with `{resume}`, or measure its checkpoints with "
        "--checkpoints all"
    )


def _adapter(file: Path) -> Target:
    return _of_file(file, load_adapter(file).contract, "adapter", "--lora")


def _embedding(file: Path) -> Target:
    return _of_file(file, read_embedding(file).contract, "embedding", "--embedding")


def _of_file(file: Path, contract: Mapping[str, Any], kind: str, option: str) -> Target:
    run = run_of(file)
    if run is None or not (run / CONFIG_FILE).is_file():
        name = file.stem if file.parent.name in (kind, "") else file.parent.name
        return Target(contract.get("name") or name, [Weights(kind, None, file, option)], contract=contract)
    config = load_config(run / CONFIG_FILE).config
    step = _or_none(lambda: step_of(file, run))
    name = kind if step is None else f"step {step}"
    return Target(f"{config.name}-{name}", [Weights(name, step, file, option)], config=config, contract=contract)


def _model(folder: Path) -> Target:
    run = run_of(folder / INDEX_FILE)
    config = load_config(run / CONFIG_FILE).config if run and (run / CONFIG_FILE).is_file() else None
    name = folder.resolve().name
    return Target(config.name if config else name, [Weights(name, None, folder, "--base")], config=config)


def _or_none(step: Callable[[], int | None]) -> int | None:
    try:
        return step()
    except (OSError, ValueError, LookupError):
        return None
