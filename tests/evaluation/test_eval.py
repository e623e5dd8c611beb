"""`sd3tune eval` on tiny: pictures are drawn once, measured, and compared; mistakes are one line."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sd3tune
from sd3tune.commands.train import run_training
from sd3tune.config import load_config
from sd3tune.evaluation import pictures as drawing
from sd3tune.evaluation.pictures import plan_drawings
from sd3tune.evaluation.prompts import choose_prompts
from sd3tune.evaluation.request import EvalRequest
from sd3tune.evaluation.target import Target, find_target
from sd3tune.inference import image_folder
from sd3tune.inference.recipes import read_recipe
from sd3tune.measures.subject import read_subject
from sd3tune.publish.card import is_unchanged
from sd3tune.run.card import card_to_upload, refresh_card
from sd3tune.runtime.processes import Processes
from tests.conftest import Command
from tests.evaluation.conftest import PROMPTS, TRAINED, WITHOUT_OTHERS, Draw, SmallPictures
from tests.measures.small_models import save_clip, save_dinov2
from tests.pictures import distance

FIGURES = "eval.json"
KINDS = ("good", "overfitted", "underfitted", "undecided", "none")


@pytest.fixture
def run(dog_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dog_run, tmp_path / "dog"))


def read(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / FIGURES).read_text())
    return values


def few(prompts_file: Path) -> list[object]:
    return ["--prompts", prompts_file, "--seeds", "2", *WITHOUT_OTHERS]


# What it does.


def test_an_encoder_that_cannot_be_had_is_named_before_anything_is_drawn(
    run: Path, prompts_file: Path, command: Command, monkeypatch
) -> None:
    def interrupted(*_: object) -> list[Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(drawing.Drawing, "draw", interrupted)
    finished = command("eval", run, *few(prompts_file), "--encoder", f"dinov2={run / 'nothing'}")
    assert finished.code == 130
    assert f"warning: not measured: dinov2: {run / 'nothing'}: " in finished.out + finished.err


@pytest.mark.usefixtures("small_encoder")
def test_all_checkpoints_are_drawn_once_and_measured(run: Path, prompts_file: Path, command: Command) -> None:
    finished = command("eval", run, "--checkpoints", "all", *few(prompts_file))
    assert finished.code == 0, finished.err
    values = read(run / "eval")
    assert [(row["name"], row["kind"], row["step"]) for row in values["rows"]] == [
        ("photos", "photos", None), ("base", "base", None), ("step 2", "trained", 2), ("step 4", "trained", 4),
    ]  # fmt: skip
    assert values["prompts"] == list(PROMPTS)
    assert values["class_prompts"] == ["a dog on a beach", "a drawing of a dog"]
    assert values["not_scored"] == [TRAINED]
    assert values["photos"] == {"training": 4, "held_out": 1}
    likeness = [row["figures"]["small"]["subject"]["mean"] for row in values["rows"][1:]]
    assert len(set(likeness)) == 3  # each row has weights of its own
    assert values["verdict"]["kind"] in KINDS
    assert len(values["pictures"]) == 3 * (2 + 2) * 2  # rows, prompts of both kinds, seeds
    files = {picture["file"] for picture in values["pictures"]}
    assert files == {path.name for path in (run / "eval" / "pictures").iterdir()}
    assert {path.name for path in (run / "eval").iterdir()} == {
        FIGURES, "eval.md", "pictures", "nearest.png", "checkpoints.png", "drift.png",
    }  # fmt: skip
    printed = finished.out.splitlines()
    assert "24 drawn in" in finished.out
    assert values["verdict"]["sentence"] in printed
    assert [line.split("  ")[0] for line in printed if line.startswith(("photos  ", "base  ", "step "))][-4:] == [
        "photos", "base", "step 2", "step 4",
    ]  # fmt: skip
    assert f"note: not scored, as the training used them: '{TRAINED}'" in printed
    assert printed[-1].split()[1:4] == ["infer", "--lora", str(run)]

    again = command("eval", run, "--checkpoints", "all", *few(prompts_file))
    assert "0 drawn in" in again.out
    assert read(run / "eval") == values

    for picture in (run / "eval" / "pictures").glob("step-2-*"):
        picture.unlink()
    again = command("eval", run, "--checkpoints", "all", *few(prompts_file))
    assert "8 drawn in" in again.out
    assert again.out.count("tensors loaded") == 1  # only the adapter that draws
    assert read(run / "eval") == values


@pytest.mark.usefixtures("small_encoder")
def test_a_picture_is_that_of_infer(run: Path, prompts_file: Path, command: Command, tmp_path: Path) -> None:
    assert command("eval", run, *few(prompts_file)).code == 0
    assert command("infer", "--lora", run, "--prompt", PROMPTS[1], "--seed", 1, "--out", tmp_path / "infer").code == 0
    (pair,) = (tmp_path / "infer").glob("*-before-after.png")
    (drawn,) = (path for path in (tmp_path / "infer").glob("*.png") if path != pair)
    pictures = read(run / "eval")["pictures"]
    (found,) = (one for one in pictures if (one["row"], one["prompt"], one["seed"]) == ("step 4", PROMPTS[1], 1))
    assert distance(run / "eval" / "pictures" / found["file"], drawn) == 0


@pytest.mark.usefixtures("small_encoder")
def test_a_killed_evaluation_goes_on_and_gives_the_same_figures(
    run: Path, prompts_file: Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = command("eval", run, "--out", tmp_path / "whole", *few(prompts_file))
    assert whole.code == 0, whole.err
    save, count = image_folder.save_png, 0

    def killed(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 5:
            raise KeyboardInterrupt
        save(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "save_png", killed)
        assert command("eval", run, *few(prompts_file)).code == 130
    assert not (run / "eval" / FIGURES).exists()
    assert len(list((run / "eval" / "pictures").glob("*.png"))) == 5
    resumed = command("eval", run, *few(prompts_file)).out
    assert "11 drawn in" in resumed
    assert "tensors loaded, weight 1\n" in resumed
    assert (run / "eval" / FIGURES).read_bytes() == (tmp_path / "whole" / FIGURES).read_bytes()
    assert (run / "eval" / "eval.md").read_bytes() == (tmp_path / "whole" / "eval.md").read_bytes()


def test_two_processes_draw_each_picture_once_and_all_of_them(run: Path, tmp_path: Path, prompts_file: Path) -> None:
    request = EvalRequest(str(run), prompts=prompts_file, seeds=2)
    target, subject = find_target(str(run), "last"), read_subject([TRAINED], ["a dog"])
    prompts = choose_prompts(request, subject, [], nano=False)
    barrier, turn, drawn = threading.Barrier(2, timeout=120), threading.Lock(), {}

    def wait() -> None:
        turn.release()
        barrier.wait()
        turn.acquire()

    def draw(rank: int) -> None:
        with turn:  # models are loaded by one thread at a time
            (one,) = plan_drawings(request, target, prompts, tmp_path)
            drawn[rank] = list(one.draw(Processes(rank, 2, lambda tensor: tensor, lambda tensor: tensor, wait)))

    threads = [threading.Thread(target=draw, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn[0] == drawn[1]
    assert len({picture.file for picture in drawn[0]}) == 2 * (2 + 2) * 2
    assert len(list((tmp_path / drawing.PICTURES).iterdir())) == len(drawn[0])


@pytest.mark.usefixtures("small_encoder")
def test_the_card_shows_the_figures_and_stays_unedited(run: Path, prompts_file: Path, command: Command) -> None:
    assert "## How it draws" not in (run / "README.md").read_text()
    assert command("eval", run, *few(prompts_file)).code == 0
    card, values = (run / "README.md").read_text(), read(run / "eval")
    assert values["verdict"]["sentence"] in card
    assert "| step 4 |" in card
    assert is_unchanged(card)
    assert card_to_upload(run, "user/dog").decode() != card  # still known as not edited
    for other in ('{"sd3tune_eval": 99}', '{"sd3tune_eval": 1, "rows": 3}', "not JSON"):
        (run / "eval" / FIGURES).write_text(other)
        assert refresh_card(run) is None
        assert "## How it draws" not in (run / "README.md").read_text()


@pytest.mark.usefixtures("small_encoder")
def test_a_dry_run_says_how_much_there_is_to_draw_and_writes_nothing(
    run: Path, prompts_file: Path, command: Command
) -> None:
    before = sorted(run.rglob("*"))
    finished = command("eval", run, "--dry-run", "--checkpoints", "all", *few(prompts_file))
    assert finished.code == 0
    assert finished.out.splitlines() == [
        "photos    4 photos, 1 held-out photo",
        "rows      base, step 2, step 4",
        "pictures  2 prompts and 2 class prompts x 2 seeds for each: 24, of which 0 are there; "
        f"in {run / 'eval' / 'pictures'}",
        "encoders  small (pixels)",
        "dry run: nothing was drawn, measured or written",
    ]
    assert sorted(run.rglob("*")) == before


def test_a_dry_run_forecasts_from_the_runs_previews(run: Path, prompts_file: Path, edit_json: Any) -> None:
    target = find_target(str(run), "last")
    assert drawing.seconds_each(target) is None
    edit_json(run / "run.json", lambda values: values["timings"].update(preview_s=3.0))
    (run / "samples").mkdir()
    for name in ("base-0.png", "step-000004-0.png", "over_time.png"):
        Image.new("RGB", (8, 8)).save(run / "samples" / name)
    config = load_config(run / "config.yaml", ["preview.prompts=[a dog]"]).config
    assert drawing.seconds_each(Target("dog", run=run, config=config)) == 1.5


def test_with_models_in_transformers_format(run: Path, prompts_file: Path, tmp_path: Path, command: Command) -> None:
    dinov2, clip = save_dinov2(tmp_path / "dinov2"), save_clip(tmp_path / "clip")
    encoders = ("--encoder", f"dinov2={dinov2}", "--encoder", f"clip={clip}")
    finished = command("eval", run, "--prompts", prompts_file, "--seeds", 1, *encoders)
    assert finished.code == 0, finished.err
    rows = {row["name"]: row["figures"] for row in read(run / "eval")["rows"]}
    assert rows["step 4"]["dinov2"].keys() == {"subject", "held_out", "nearest", "class_subject", "moved"}
    assert rows["step 4"]["clip"].keys() == {"subject", "held_out", "nearest", "class_subject", "moved", "prompt"}
    assert read(run / "eval")["encoders"][0]["source"] == "dinov2"  # the name of the folder, not its path


@pytest.mark.usefixtures("small_encoder")
def test_a_folder_of_pictures_is_measured_as_it_is(tmp_path: Path, noise_pictures: Draw, command: Command) -> None:
    photos, folder = noise_pictures(tmp_path / "photos", 3), noise_pictures(tmp_path / "mine", 3)
    finished = command("eval", folder, "--photos", photos, "--out", tmp_path / "out", *WITHOUT_OTHERS)
    assert finished.code == 0, finished.err
    values = read(tmp_path / "out")
    assert [(row["name"], row["kind"]) for row in values["rows"]] == [("photos", "photos"), ("mine", "folder")]
    assert values["rows"][1]["figures"]["pixels"]["nearest"]["mean"] == 0
    assert [one["figures"]["small"]["nearest_photo"] for one in values["pictures"]] == ["0.png", "1.png", "2.png"]
    assert "no verdict: a folder of pictures has no base to compare with" in finished.out


TOKEN = "token: <rex>, vectors: 1, init: dog"


@pytest.mark.usefixtures("small_encoder")
@pytest.mark.parametrize(
    ("method", "option", "product"),
    [
        (f"{{kind: textual_inversion, {TOKEN}}}", "--embedding", "embedding/learned_embeds.safetensors"),
        pytest.param(f"{{kind: pivotal, rank: 2, embedding: {{{TOKEN}}}}}", "--lora",
                     "adapter/pytorch_lora_weights.safetensors", marks=pytest.mark.long),
    ],
    ids=["embedding", "pivotal"],
)  # fmt: skip
def test_a_learned_token_is_compared_with_the_class_word_of_the_base(
    quick_config, write_images, tmp_path: Path, command: Command, method: str, option: str, product: str
) -> None:
    folder, run = write_images(tmp_path / "photos", 2), tmp_path / "rex"
    for file in folder.glob("*.txt"):
        file.write_text("a photo of <rex>")
    run_training(
        quick_config(run, f"method={method}", f"data.sources=[{{path: {folder}}}]", "train.steps=1", "preview.steps=1")
    )
    (tmp_path / "prompts.txt").write_text("<rex> on a beach")
    options = ("--prompts", tmp_path / "prompts.txt", "--seeds", "1", *WITHOUT_OTHERS)
    assert command("eval", run, *options).code == 0
    found = {one["row"]: run / "eval" / "pictures" / one["file"] for one in read(run / "eval")["pictures"]
             if one["prompt"] == "<rex> on a beach"}  # fmt: skip
    assert sorted(found) == ["base", "step 1"]
    assert read_recipe(found["base"])["prompt"] == "dog on a beach"
    for row, arguments in {"base": ("--from", found["base"]),
                           "step 1": (option, run, "--prompt", "<rex> on a beach", "--no-before")}.items():  # fmt: skip
        out = tmp_path / row
        assert command("infer", *arguments, "--out", out).code == 0
        (drawn,) = out.glob("*.png")
        assert distance(found[row], drawn) == 0
    (weights,) = find_target(str(run / product), "last").weights
    assert (weights.name, weights.option, weights.path) == ("step 1", option, run / product)


@pytest.mark.usefixtures("small_encoder")
def test_from_python_it_returns_the_rows_and_the_verdict(run: Path, prompts_file: Path, tmp_path: Path) -> None:
    without = dict.fromkeys(("dinov2", "clip"), "none")
    found = sd3tune.evaluate(
        sd3tune.Run(run), prompts=prompts_file, seeds=1, out=tmp_path / "out", encoders=without, class_word="dog"
    )
    assert isinstance(found, sd3tune.Evaluation)
    assert found.folder == tmp_path / "out"
    assert [row["row"] for row in found.table] == ["photos", "base", "step 4"]
    assert found.verdict.sentence == found.values["verdict"]["sentence"]
    assert str(found).endswith(found.verdict.sentence)
    assert "<th>likeness small</th>" in found._repr_html_()
    assert "## How it draws" not in (run / "README.md").read_text()  # the figures are elsewhere


@pytest.mark.usefixtures("small_encoder")
def test_json_has_a_result_for_the_verdict(run: Path, prompts_file: Path, command: Command) -> None:
    printed = command("--json", "eval", run, "--quiet", *few(prompts_file)).out
    last = [json.loads(line) for line in printed.splitlines()][-1]
    assert last["kind"] == "result"
    assert (last["best"], last["folder"]) == ("step 4", str(run / "eval"))
    assert last["verdict"] in KINDS


@pytest.mark.usefixtures("small_encoder")
def test_a_full_fine_tune_is_compared_with_its_base_and_one_from_scratch_with_none(
    quick_config, scratch_config, tmp_path: Path, command: Command, prompts_file: Path
) -> None:
    once = ("train.steps=1", "preview.steps=1")
    for name, make in (("full", quick_config), ("scratch", scratch_config)):
        run_training(make(tmp_path / name, "method={kind: full}", *once))
        finished = command("eval", tmp_path / name, "--prompts", prompts_file, "--seeds", "1", *WITHOUT_OTHERS)
        assert finished.code == 0, finished.err
    full, scratch = (read(tmp_path / name / "eval") for name in ("full", "scratch"))
    assert [row["name"] for row in full["rows"]] == ["photos", "base", "step 1"]
    assert full["rows"][1]["figures"] != full["rows"][2]["figures"]
    assert [row["name"] for row in scratch["rows"]] == ["photos", "step 1"]
    assert scratch["notes"][-2].startswith("there is no row of the base: a model from scratch has none")
    assert finished.out.splitlines()[-1].split()[1:4] == ["infer", "--base", str(tmp_path / "scratch" / "model")]


# Distances.


def test_fid_and_kid_of_two_folders_and_what_they_need(
    tmp_path: Path, noise_pictures: Draw, command: Command, small_encoder: SmallPictures
) -> None:
    first, second = noise_pictures(tmp_path / "a", 8), noise_pictures(tmp_path / "b", 12)
    finished = command("eval", "--fid", first, second, *WITHOUT_OTHERS)
    assert finished.code == 0, finished.err
    assert small_encoder.seen == 20
    assert "warning: 8 pictures a side: FID needs 10,000" in finished.out
    assert "note: 8 and 12 pictures: FID of unequal sides is not comparable" in finished.out
    assert finished.out.splitlines()[-1].startswith("small  FID ")


# Mistakes.


def spoiled(run: Path) -> None:
    (run / "adapter" / "pytorch_lora_weights.safetensors").unlink()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give a run, an adapter or a folder of pictures; or --fid A B"),
        (["nothing"], "nothing: no such run, adapter or folder"),
        (["dog/none"], "dog/none: no such run, adapter or folder"),
        (["empty"], "empty: holds no run, no adapter, no model and no pictures"),
        (["mine"], "mine: its photos are not known here; give them with --photos DIR"),
        (["cut"], "cut/pytorch_lora_weights.safetensors: not a readable safetensors file"),
        (["two"], "name one of a.safetensors, b.safetensors"),
        (["mine", "--checkpoints", "all"], "--checkpoints all: mine is no run folder, so it has no checkpoints"),
        (["dog", "--checkpoints", "al"], "--checkpoints al: did you mean 'all'?"),
        (["dog", "--protocol", "paper"], "--protocol paper: one of default, dreambooth"),
        (["dog", "--kind", "alive"], "--kind alive: did you mean 'live'?"),
        (["dog", "--protocol", "dreambooth", "--prompts", "p.txt"], "--prompts: not with --protocol dreambooth"),
        (["dog", "--seeds", "0"], "--seeds 0: the number of pictures for each prompt, from 1 to 1000"),
        (["dog", "--class", " "], "--class: is blank"),
        (["dog", "--prompts", "empty.txt"], "--prompts empty.txt: holds no prompts"),
        (["dog", "--prompts", "none.txt"], "--prompts none.txt: cannot be read (No such file or directory)"),
        (["dog", "--prompts", "trained.txt"], "every prompt is one that the training used"),
        (["dog", "--photos", "none"], "--photos: none: no such folder"),
        (["dog", "--photos", "empty"], "--photos: empty: holds no images"),
        (["dog", "--photos", "broken"], "broken/0.png: cannot be decoded"),
        (["dog", "--encoder", "clip"], "--encoder clip: write NAME=FOLDER"),
        (["dog", "--encoder", "klip=x"], "encoder 'klip': no such encoder"),
        (["dog", "--size", "17"], "--size 17x17: both sides must be multiples of 16"),
        (["dog", "--out", "p.txt/x"], "--out: p.txt/x cannot be made: Not a directory; choose another folder"),
        (["dog", "--fid", "mine", "mine"], "--fid: compares two folders alone; leave dog out"),
        (["--fid", "none", "mine"], "--fid: none: no such folder"),
        (["--fid", "mine", "mine"], "--fid: mine: holds 1 pictures; at least 4 are needed"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], says: str, run: Path, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch,
    noise_pictures: Draw,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for folder, files in {"empty": [], "cut": ["pytorch_lora_weights"], "two": ["a", "b"]}.items():
        (tmp_path / folder).mkdir()
        for file in files:
            (tmp_path / folder / f"{file}.safetensors").write_bytes(b"cut")
    noise_pictures(tmp_path / "mine", 1)
    broken = noise_pictures(tmp_path / "broken", 1) / "0.png"
    broken.write_bytes(broken.read_bytes()[:300])
    for name, text in (("empty.txt", "\n# nothing\n"), ("trained.txt", TRAINED), ("p.txt", "sks dog")):
        (tmp_path / name).write_text(text)
    finished = command("eval", *words)
    assert finished.code == 2
    errors = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, finished.err
    assert says in errors[0]
    assert not (run / "eval").exists()


def test_an_unfinished_run_offers_its_checkpoints(run: Path, command: Command, edit_json: Any) -> None:
    spoiled(run)
    finished = command("eval", run)
    assert finished.code == 2
    assert "has not finished, and is at step 4; finish it with `" in finished.err
    assert "or measure its checkpoints with --checkpoints all" in finished.err
    for checkpoint in (run / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    finished = command("eval", run)
    assert finished.code == 2
    assert f"{run}: holds no trained weights yet; finish the run with `" in finished.err


def test_photos_that_were_moved_are_named_and_can_be_given(
    quick_config, run: Path, tmp_path: Path, command: Command, prompts_file: Path
) -> None:
    config = (run / "config.yaml").read_text()
    folder = load_config(run / "config.yaml").config.data.sources[0].path
    (run / "config.yaml").write_text(config.replace(str(folder), str(tmp_path / "gone")))
    finished = command("eval", run)
    assert finished.code == 2
    assert f"error: {tmp_path / 'gone'}: no such folder; check data.sources; the run's photos are" in finished.err
    given = command("eval", run, "--photos", folder, "--dry-run", *few(prompts_file))
    assert given.code == 0, given.err
    assert given.out.startswith("photos    5 photos\n")
    named_by_captions = command("eval", run, "--photos", folder, "--dry-run")
    assert "10 prompts and 10 class prompts" in named_by_captions.out, named_by_captions.err
