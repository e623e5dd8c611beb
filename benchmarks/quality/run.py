"""`python -m benchmarks.quality.run [PEER_SCRIPT]`: measure trainings on nano; write table and JSON.

Existing figures with the same settings are not measured again, so an interrupted command continues, and several
processes with different seeds can fill the same tables.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.quality.measure import Panel, Shares
    from benchmarks.quality.variants import Variant
    from sd3tune.inference.pipeline import ImagePipeline

Measure = Callable[[], dict[str, float]]


def main(arguments: Sequence[str] | None = None) -> int:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from benchmarks.quality import report

    options = _parser().parse_args(arguments)
    if options.quick:
        _make_quick(options)
    settings = _settings(options.prompts)
    done = {} if options.fresh else report.load(options.out, settings)
    with tempfile.TemporaryDirectory(prefix="sd3tune-quality-") as folder:
        for name, measure in _measurements(options, Path(folder)):
            if name in done or not any(name.startswith(prefix) for prefix in options.only):
                continue
            print(name, end=": ", flush=True)
            measured = measure()
            print(", ".join(f"{key} {value:.3g}" for key, value in measured.items()), flush=True)
            report.add(name, measured, settings, options.out)
    return 0


def _make_quick(options: argparse.Namespace) -> None:
    """Measure few trainings, seeds and prompts, beside the committed tables: ten minutes on two cores."""
    from benchmarks.quality.report import BASE, REFERENCE
    from benchmarks.quality.variants import WITH_CLASS_IMAGES as PRIOR

    options.seeds, options.prompts, options.out = [0, 1, 2], 24, Path("build", "quality")
    options.only = ["base/", f"lora/{BASE}/", f"lora/{REFERENCE}/", f"lora/{PRIOR.group}/{PRIOR.name}/"]
    (options.out / "results").mkdir(parents=True, exist_ok=True)
    readme = options.out / "README.md"
    if not readme.exists():
        readme.write_text("<!-- quality -->\n<!-- end of quality -->\n", encoding="utf-8")
    print(f"tables: {readme}")


def _settings(prompts: int) -> dict[str, Any]:
    """Return the settings that all figures of a table share."""
    from benchmarks.quality.variants import PRIOR_PROMPTS
    from sd3tune.commands.demo import CONFIG, SAMPLER
    from sd3tune.model.base.resolve import resolve_base

    return {
        "prompts": prompts,
        "prior prompts": PRIOR_PROMPTS,
        "sampler steps": SAMPLER.steps,
        "recipe": {
            "rank": CONFIG["method"]["rank"],
            "learning rate": CONFIG["optimizer"]["lr"],
            "steps": CONFIG["train"]["steps"],
            "batch": CONFIG["train"]["batch_size"],
        },
        "base": resolve_base("nano").fingerprint("transformer"),
    }


def _measurements(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Measure]]:
    """Yield (name, measurement) for the base, each training and the peer. Names are paths: kind/name/seed."""
    from benchmarks.quality.measure import Panel, measure_base, measure_panel
    from benchmarks.quality.peer import SideBySide
    from benchmarks.quality.variants import BESIDE_THE_SCRIPT
    from sd3tune.commands.demo import SAMPLER, T5_LENGTH
    from sd3tune.inference.pipeline import ImagePipeline

    pipeline = ImagePipeline("nano", SAMPLER, t5_length=T5_LENGTH)
    for seed in options.seeds:
        panel = Panel.of(options.prompts, seed)
        yield f"base/all/{seed}", functools.partial(measure_base, pipeline, options.prompts, seed)
        yield f"lora/none/the base/{seed}", functools.partial(measure_panel, pipeline.draw, panel)
        for kind, variants, measure in _trainings(pipeline, panel):
            for variant in variants:
                name = f"{kind}/{variant.group}/{variant.name}/{seed}"
                run = folder / name.replace("/", "-").replace(" ", "-")
                yield name, functools.partial(measure, variant, run, folder / "store", seed)
        if options.peer is not None:
            both = SideBySide(options.peer, pipeline.base.path, folder)
            for kind, recipe in BESIDE_THE_SCRIPT.items():
                yield f"peer/{kind}/{seed}", functools.partial(both.compare, pipeline, panel, seed, recipe)


def _trainings(
    pipeline: ImagePipeline, panel: Panel
) -> Iterator[tuple[str, Sequence[Variant], Callable[[Variant, Path, Path, int], Shares]]]:
    """Yield the kinds of trainings, each with its variants and the function that trains and measures one."""
    from benchmarks.quality.measure import measure_lora, measure_method
    from benchmarks.quality.methods import DATA, METHODS, SUBJECTS, measure_data, measure_subjects
    from benchmarks.quality.protocol import PROTOCOL, measure_protocol
    from benchmarks.quality.variants import VARIANTS

    yield "lora", VARIANTS, functools.partial(measure_lora, pipeline, panel)
    yield "method", METHODS, functools.partial(measure_method, panel)
    yield "data", DATA, functools.partial(measure_data, pipeline, panel)
    yield "subjects", SUBJECTS, functools.partial(measure_subjects, pipeline, len(panel.subject))
    yield "protocol", PROTOCOL, measure_protocol


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.run", description=__doc__)
    parser.add_argument("peer", nargs="?", type=Path, help="diffusers' train_dreambooth_lora_sd3.py")
    parser.add_argument("--only", nargs="+", default=[""], help="names that begin so, such as base or lora/rank")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="a training of each kind for each (0 to 4)"
    )
    parser.add_argument("--prompts", type=int, default=72, help="prompts behind each share, per seed (72)")
    parser.add_argument("--quick", action="store_true", help="few trainings into build/quality, in ten minutes")
    parser.add_argument("--fresh", action="store_true", help="forget what the JSON holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent, help="folder of README.md, results/")
    return parser


if __name__ == "__main__":
    sys.exit(main())
