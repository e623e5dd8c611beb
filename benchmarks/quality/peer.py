"""diffusers' example on nano: the recipe as flags of the script, for equal steps or equal CPU seconds."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peer.processes import Stamps, run_alone
from benchmarks.quality.measure import Panel, Shares, measure_panel
from benchmarks.quality.variants import PRIOR_KEY, Variant
from sd3tune.commands.demo import CONFIG, PICTURES, PRIOR, SIDE, T5_LENGTH
from sd3tune.config import dump_config
from sd3tune.data.sources.metadata import JSONL, write_jsonl
from sd3tune.inference.pipeline import ImagePipeline
from sd3tune.nano.tasks import CLASS_PROMPTS, NAME
from sd3tune.nano.world import CLASS

NEVER = 10**9


@dataclass(frozen=True)
class SideBySide:
    """Whole commands of both sides, as separate processes, in a working folder."""

    script: Path
    base: Path
    folder: Path

    def compare(self, pipeline: ImagePipeline, panel: Panel, seed: int, recipe: Variant) -> Shares:
        """Train both sides for the recipe's steps, and the script again for as many steps as fit sd3tune's CPU seconds.

        Return the shares of `measure_panel`, `cpu_s` and `steps`, with prefix `ours: `, `peer: ` or `peer, as long: `.
        CPU seconds hardly depend on the machine's other load. Each side draws its class images before, so the seconds
        cover training only.
        """
        steps: int = CONFIG["train"]["steps"]
        if PRIOR_KEY in recipe.changes:
            self._draw_class_images(seed, recipe)
        run, ours = self._train_ours(seed, recipe)
        shares = _behind("ours", measure_panel(partial(pipeline.draw, adapter=run), panel), ours)
        peer = self._train_peer(steps, seed, recipe)
        shares |= _behind("peer", self._measured(pipeline, panel), peer)
        fitting = (ours.cpu - peer.cpu + _stepping_seconds(peer)) / _stepping_seconds(peer)
        longer = self._train_peer(max(1, round(steps * fitting)), seed, recipe)
        return shares | _behind("peer, as long", self._measured(pipeline, panel), longer)

    def _measured(self, pipeline: ImagePipeline, panel: Panel) -> Shares:
        return measure_panel(partial(pipeline.draw, adapter=self._peer_adapter), panel)

    @property
    def _peer_adapter(self) -> Path:
        return self.folder / "peer-run" / "pytorch_lora_weights.safetensors"

    @property
    def _our_run(self) -> Path:
        return self.folder / "ours-run"

    @property
    def _class_images(self) -> dict[str, Path]:
        return {side: self.folder / f"{side}-class" for side in ("ours", "peer")}

    def _draw_class_images(self, seed: int, recipe: Variant) -> None:
        """Draw class images by `sd3tune cache`, and by one step of the script."""
        for folder in self._class_images.values():
            shutil.rmtree(folder, ignore_errors=True)
        run_alone("ours", ["cache", str(self._our_config(seed, recipe))], self.folder, steps=0)
        self._train_peer(1, seed, recipe)

    def _train_ours(self, seed: int, recipe: Variant) -> tuple[Path, Stamps]:
        """Run `sd3tune train` with an empty store."""
        command = ["train", str(self._our_config(seed, recipe))]
        return self._our_run, run_alone("ours", command, self.folder, CONFIG["train"]["steps"])

    def _our_config(self, seed: int, recipe: Variant) -> Path:
        """Return the configuration of a new run with an empty store."""
        store = self.folder / "ours-store"
        for left_over in (self._our_run, store):
            shutil.rmtree(left_over, ignore_errors=True)
        if PRIOR_KEY in recipe.changes:
            images = {f"{PRIOR_KEY}.path": str(self._class_images["ours"])}
            recipe = replace(recipe, changes={**recipe.changes, **images})
        file = self.folder / "ours.yaml"
        file.write_text(dump_config(recipe.config(str(self._our_run), str(store), seed)), encoding="utf-8")
        return file

    def _train_peer(self, steps: int, seed: int, recipe: Variant) -> Stamps:
        shutil.rmtree(self._peer_adapter.parent, ignore_errors=True)
        return run_alone("peer", [str(self.script), *self._flags(steps, seed, recipe)], self.folder, steps)

    def _flags(self, steps: int, seed: int, recipe: Variant) -> list[str]:
        """Return the recipe's flags. Raises ValueError for changes other than prior and learning rate."""
        if recipe.changes.keys() - {PRIOR_KEY, "optimizer.lr"}:
            raise ValueError(f"{recipe.name}: the script would be trained without {sorted(recipe.changes)}")
        prior = PRIOR_KEY in recipe.changes
        flags: dict[str, Any] = {
            "pretrained_model_name_or_path": self.base,
            "dataset_name": _captioned(self.folder / "pictures"),
            "cache_dir": self.folder / "datasets",
            "caption_column": "text",
            "instance_prompt": f"a {NAME} {CLASS}",
            "output_dir": self._peer_adapter.parent,
            "resolution": SIDE,
            "train_batch_size": CONFIG["train"]["batch_size"],
            "max_train_steps": steps,
            "rank": CONFIG["method"]["rank"],
            "learning_rate": recipe.changes.get("optimizer.lr", CONFIG["optimizer"]["lr"]),
            "lr_warmup_steps": 0,
            "max_sequence_length": T5_LENGTH,
            "weighting_scheme": "logit_normal",
            "precondition_outputs": 0,
            "mixed_precision": "no",
            "checkpointing_steps": NEVER,
            "seed": seed,
        }
        if prior:
            flags |= {
                "class_data_dir": self._class_images["peer"],
                "class_prompt": CLASS_PROMPTS[0],
                "num_class_images": PRIOR["images"],
            }
        switches = ["--center_crop", *(["--with_prior_preservation"] if prior else [])]
        return [*switches, *(word for flag, value in flags.items() for word in (f"--{flag}", str(value)))]


def _behind(side: str, shares: Shares, stamps: Stamps) -> Shares:
    figures = shares | {"cpu_s": stamps.cpu, "steps": len(stamps.steps)}
    return {f"{side}: {name}": value for name, value in figures.items()}


def _stepping_seconds(stamps: Stamps) -> float:
    """Return the CPU seconds of all steps, extrapolated from all but the first."""
    count = len(stamps.steps)
    return (stamps.steps[-1][0][1] - stamps.steps[0][0][1]) * count / max(1, count - 1)


def _captioned(folder: Path) -> Path:
    """Return the recipe's pictures with a metadata file for the datasets library."""
    if not folder.exists():
        folder.mkdir(parents=True)
        rows = []
        for picture in sorted(PICTURES.glob("*.png")):
            (folder / picture.name).write_bytes(picture.read_bytes())
            rows.append((picture.name, picture.with_suffix(".txt").read_text(encoding="utf-8").strip()))
        write_jsonl(folder / JSONL, rows)
    return folder
