"""Steps and guidance are those of the training's previews, so that the printed command draws a preview again."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from sd3tune.adapter.file import Adapter, find_adapter, read_adapter, write_adapter
from sd3tune.cli.main import app
from sd3tune.commands.infer import run_infer
from sd3tune.commands.train import run_training
from sd3tune.errors import AdapterError
from sd3tune.inference.conditions import Conditions, settle_conditions
from sd3tune.inference.job import InferenceJob
from sd3tune.inference.recipes import read_recipe
from sd3tune.run.thumbnail import with_metadata

PROMPT = "a photo of sks dog, it's wet"
PREVIEW = f'preview={{every: 3, prompts: ["{PROMPT}", a cat], steps: 3, guidance: 3.5, seed: 4}}'


@pytest.fixture(scope="module")
def run(quick_config, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "dog"
    run_training(quick_config(run, PREVIEW, "train.steps=2", "ema={decay: 0.5}", "method.alpha=3.0"))
    return run


def stating(run: Path, folder: Path, **contract: object) -> Adapter:
    """The run's adapter in `folder` with other values in its contract; None removes a key."""
    adapter = read_adapter(run)
    factors = {
        f"{module}.lora_{letter}": factor
        for module, pair in adapter.factors.items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    merged = {**adapter.contract, **contract}
    write_adapter(folder, factors, {key: value for key, value in merged.items() if value is not None})
    return read_adapter(folder)


def settled(*adapters: Adapter, **asked: object) -> Conditions:
    return settle_conditions(InferenceJob.from_fields(loras=[], prompt=PROMPT, out=Path("images"), **asked), adapters)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("what", "options"),
    [
        ("an average, alpha no power of two", ("ema={decay: 0.5}", "method.alpha=3.0")),
        ("a whole model with a shift of its own", ("method={kind: full}", "optimizer.lr=1e-4", "flow.shift=2.0")),
    ],
)
def test_the_next_command_draws_the_last_preview(
    quick_config, tmp_path: Path, monkeypatch, capsys, what: str, options: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_training(quick_config(tmp_path / "runs" / "dog", PREVIEW, "train.steps=2", *options))
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:2] == ["sd3tune", "infer"]
    assert words[-6:-2] == ["--prompt", PROMPT, "--seed", "4"]
    assert not {"--guidance", "--steps"} & set(words)
    app([*words[1:], "--no-before"], standalone_mode=False)
    (drawn,) = (tmp_path / "runs" / "dog" / "images").iterdir()
    preview = Image.open(tmp_path / "runs" / "dog" / "samples" / "step-000002-0.png")
    assert ImageChops.difference(Image.open(drawn), preview).getbbox() is None
    recipe = read_recipe(drawn)
    assert recipe is not None
    assert (recipe["steps"], recipe["guidance"]) == (3, 3.5)


def test_without_prompts_it_draws_a_caption_with_what_previews_would_have_had(quick_config, tmp_path, capsys) -> None:
    run_training(quick_config(tmp_path / "run", "train.steps=1", "preview={steps: 2, guidance: 2.5}"))
    assert "--prompt 'a red picture of sks dog' --out" in capsys.readouterr().out.splitlines()[-1]
    assert settled(read_adapter(tmp_path / "run")).guidance == 2.5
    assert settled(read_adapter(tmp_path / "run")).steps == 2


def test_files_that_state_neither_are_drawn_as_before(run: Path, tmp_path: Path) -> None:
    conditions = settled(stating(run, tmp_path, guidance=None, sampling_steps=None))
    assert (conditions.steps, conditions.guidance) == (28, 7.0)
    conditions = settled(base="tiny")
    assert (conditions.steps, conditions.guidance) == (28, 7.0)


def test_flags_files_axes_and_recipes_win(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt,guidance,steps\na,2,\nb,,1\n")
    common = {"loras": [str(run)], "before": False, "size": (16, 16)}

    def drawn(name: str, **asked: object) -> list[tuple[int, float]]:
        files = run_infer(InferenceJob.from_fields(out=tmp_path / name, **{"prompt": "a", **common, **asked}))  # type: ignore[arg-type]
        recipes = [recipe for file in files if (recipe := read_recipe(file)) and "sheet" not in recipe]
        return [(recipe["steps"], recipe["guidance"]) for recipe in recipes]

    assert drawn("plain") == [(3, 3.5)]
    assert drawn("flags", steps=1, guidance=1.0) == [(1, 1.0)]
    assert drawn("file", prompt=None, prompts=tmp_path / "p.csv") == [(3, 2.0), (1, 3.5)]
    assert drawn("axis", grid=["guidance=1,2"]) == [(3, 1.0), (3, 2.0)]
    (picture,) = (tmp_path / "flags").iterdir()
    assert drawn("again", prompt=None, from_picture=picture) == [(1, 1.0)]


def test_of_several_adapters_the_first_ones_are_used_with_a_warning(run: Path, tmp_path: Path, capsys) -> None:
    first, earlier = read_adapter(run), stating(run, tmp_path, guidance=None, sampling_steps=3)
    conditions = settled(first, earlier)
    assert (conditions.steps, conditions.guidance) == (3, 3.5)
    assert capsys.readouterr().out.splitlines() == [
        "warning: the adapters' previews had different guidance (3.5; 7); the first one's is used, "
        "--guidance sets another"
    ]
    settled(first, earlier, guidance=4.0)
    settled(first, first)
    assert capsys.readouterr().out == ""


def test_values_that_only_the_adapters_steps_or_guidance_allow(run: Path, tmp_path: Path) -> None:
    """0.04 of 28 steps is one step and of 3 none; skip-layer guidance needs guidance."""
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    asked = {"image": tmp_path / "a.png", "strength": 0.04, "before": False}
    with pytest.raises(Exception, match=r"--strength 0\.04: no step of 3 is left; at least 0\.334"):
        run_infer(InferenceJob.from_fields(loras=[str(run)], prompt="a", out=tmp_path / "out", **asked))  # type: ignore[arg-type]
    many = stating(run, tmp_path / "many", sampling_steps=60, guidance=1)
    assert (
        len(
            run_infer(
                InferenceJob.from_fields(
                    loras=[str(many.path)], prompt="a", out=tmp_path / "out", **{**asked, "strength": 0.02}
                )
            )
        )
        == 1
    )  # type: ignore[arg-type]
    with pytest.raises(Exception, match=r"--slg 1: needs guidance above 1; it is 1"):
        run_infer(
            InferenceJob.from_fields(loras=[str(many.path)], prompt="a", out=tmp_path / "out", slg=1.0, slg_layers=(1,))
        )


@pytest.mark.parametrize(
    ("stated", "said"),
    [
        ({"guidance": -1.0}, "guidance: Input should be greater than or equal to 0"),
        ({"guidance": "much"}, "guidance: Input should be a valid number"),
        ({"guidance": float("inf")}, "guidance: not a finite number"),
        ({"sampling_steps": 0}, "sampling_steps: Input should be greater than or equal to 1"),
        ({"sampling_steps": 2.5}, "sampling_steps: Input should be a valid integer"),
        ({"sampling_steps": 10**9}, "sampling_steps: Input should be less than or equal to 1000"),
        ({"quantize": "evil"}, "quantize: Input should be 'none', 'nf4' or 'int8'"),
        ({"quantize": {}}, "quantize: Input should be"),
        ({"t5_quantize": "nf4"}, "t5_quantize: Input should be"),
        ({"dtype": "fp8"}, "dtype: Input should be"),
        ({"weights": 1}, "weights: Input should be"),
        ({"resolution": 10**6}, "resolution: Input should be less than or equal to 4096"),
        ({"shift": 0}, "shift: Input should be greater than 0"),
        ({"shift": "model"}, "shift: Input should be a valid number"),
        ({"sigma_range": [0, 1, 2]}, "sigma_range: List should have at most 2 items"),
        ({"sigma_range": [0, 7]}, "sigma_range.1: Input should be less than or equal to 1"),
        ({"timesteps": "uniform"}, "timesteps: Input should be a valid dictionary"),
        ({"weighting": {}}, "weighting.kind: missing"),
        ({"loss": {"kind": 3}}, "loss.kind: Input should be a valid string"),
        ({"tag_frequency": {"a": "b"}}, "tag_frequency.a: Input should be a valid integer"),
        ({"seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"alpha": "x"}, "alpha: Input should be a valid number"),
    ],
    ids=str,
)
def test_a_contract_that_cannot_be_applied_is_one_line(run: Path, tmp_path: Path, stated: dict, said: str) -> None:
    contract = json.dumps(read_adapter(run).contract | stated)
    (tmp_path / "a.safetensors").write_bytes(with_metadata(find_adapter(run), {"sd3tune": contract}))
    with pytest.raises(AdapterError, match=said):
        read_adapter(tmp_path / "a.safetensors")


def test_previews_may_change_on_resume_and_the_result_states_the_last(quick_config, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    more = ("train.steps=3", "ema={decay: 0.5}", "method.alpha=3.0", "preview={steps: 2, guidance: 1.5}")
    run_training(quick_config(tmp_path / "run", *more), resume=True)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["resumes"] == [{"from_step": 2}]
    contract = read_adapter(tmp_path / "run").contract
    assert (contract["sampling_steps"], contract["guidance"]) == (2, 1.5)
