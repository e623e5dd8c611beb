"""Loading: every problem at once, one line each, with the line of the file and the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sd3tune.config import Config, dump_config, load_config, parse_config
from sd3tune.errors import ConfigError

MINIMAL = "data: {sources: [{path: ./dog, caption: a dog}]}\n"


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> Config:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return load_config("run.yaml", overrides).config


def problems(text: str, *overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(text, *overrides)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("train: {steps: -5}", "train.steps: -5 is too small; at least 1"),
        ("train: {steps: sixteen}", "train.steps: 'sixteen' is not an integer"),
        ("train: {steps: 1e3}", "train.steps: 1000.0 is not an integer; write 1000"),
        ("train: {steps: true}", "train.steps: true is not an integer"),
        ("train: {steps: '16'}", "train.steps: '16' is not an integer; remove the quotes"),
        ("train:", "train: is empty; leave it out or give it keys: steps, epochs, batch_size"),
        ("train: 5", "train: 5 is not a section; its keys are steps, epochs, batch_size"),
        ("method: {target_modules: x}", "method.target_modules: unknown key; did you mean 'targets'?"),
        ("method: {kind: ia3}", "method.kind: 'ia3' is not one of: lora, dora, loha, lokr, full"),
        ("method: {rank: 2000}", "method.rank: 2000 is too large; at most 1024"),
        ("method: {alpha: 0}", "method.alpha: 0 is too small; must be above 0"),
        ("method: {targets: 5}", "method.targets: 5 is not a preset, a list of module names or an expression"),
        ("method: {targets: [to_q, 5]}", "method.targets.1: 5 is not text; put it in quotes"),
        ("method: {targets: []}", "method.targets: [] is empty: nothing would be trained"),
        ("method: {targets: atention}", "method.targets: 'atention' is not one of: attention, attention-image, atten"),
        ("method: {targets: 're:('}", "method.targets: 're:(' is not a regular expression: "),
        ("method: {targets: ['re:[']}", "method.targets.0: 're:[' is not a regular expression: "),
        ("method: {blocks: []}", "method.blocks: [] has 0 entries; at least 1"),
        ("method: {blocks: [-1]}", "method.blocks.0: -1 is too small; at least 0"),
        ("method: {blocks: [11-0]}", "method.blocks.0: '11-0' is not a range of blocks; write the first and the last"),
        ("method: {blocks: [first]}", "method.blocks.0: 'first' is not a range of blocks"),
        ("method: {rank_pattern: {attn.to_q: 0}}", "method.rank_pattern.attn.to_q: 0 is too small; at least 1"),
        ("method: {alpha_pattern: 4}", "method.alpha_pattern: 4 is not a section"),
        ("method: {dropout: 1}", "method.dropout: 1 is too large; must be below 1"),
        ("method: {init: pissa_niter_16}", "method.init: 'pissa_niter_16' changes the base's weights, so the saved ad"),
        ("method: {init: lora-ga}", "method.init: 'lora-ga' changes the base's weights"),
        ("method: {init: false}", "method.init: false is not one of: true, gaussian, orthogonal, eva"),
        ("method: {init: orthogonal, rank: 3}", "method: init: orthogonal gives half the rank to A and half to B; ran"),
        ("flow: {timesteps: {kind: mode, scale: 2}}", "flow.timesteps.scale: 2 is too large; at most 1.75"),
        (
            "flow: {timesteps: {kind: cosmap}, weighting: {kind: cosmap}}",
            "flow: cosmap timesteps with cosmap weighting",
        ),
        (
            "flow: {timesteps: {kind: mixture, parts: [{kind: cosmap}, {kind: cosmap}]}, weighting: {kind: cosmap}}",
            "flow: cosmap timesteps with cosmap weighting",
        ),
        ("flow: {min_sigma: 0.5, max_sigma: 0.5}", "flow: min_sigma 0.5 must be below max_sigma 0.5"),
        ("model: {extra_t5_lengths: [77, 513]}", "model.extra_t5_lengths.1: 513 is too large; at most 512"),
        ("model: {extra_t5_lengths: 77}", "model.extra_t5_lengths: 77 is not a list; write [77]"),
        ("flow: {max_sigma: 1.5}", "flow.max_sigma: 1.5 is too large; at most 1"),
        ("flow: {loss: {kind: huber, delta: 0}}", "flow.loss.delta: 0 is too small; must be above 0"),
        ("flow: {loss: {kind: l1}}", "flow.loss.kind: 'l1' is not one of: mse, absolute, huber, pseudo_huber"),
        ("flow: {noise_offset: -0.1}", "flow.noise_offset: -0.1 is too small; at least 0"),
        ("lr: 1e-4", "lr: unknown key; did you mean 'optimizer.lr'?"),
        ("zzz: 1", "zzz: unknown key; the keys here are config_version, name"),
        ("name: 5", "name: 5 is not text; put it in quotes"),
        ("name: my lora", "name: 'my lora' cannot name a folder"),
        ("name: '../up'", "name: '../up' cannot name a folder"),
        ('name: "\\ud800"', "name: holds half a character (\\ud800); write it as UTF-8"),
        ('name: "a\\0"', "name: holds NUL characters"),
        ('hub: {description: "a\\0"}', "hub.description: holds NUL characters"),
        ('hub: {description: "\\udce9"}', "hub.description: holds half a character (\\udce9); write it as UTF-8"),
        ('preview: {prompts: [a, "\\ud83d"]}', "preview.prompts.1: holds half a character (\\ud83d); write it as"),
        ('validation: {holdout: "a\\0"}', "validation.holdout: holds NUL characters"),
        ('model: {base: "/a\\0"}', "model.base: holds NUL characters"),
        ('method: {rank_pattern: {"a\\0": 4}}', "method.rank_pattern.a\\x00: holds NUL characters"),
        ('tracking: {wandb: {tags: ["\\ud83d"]}}', "tracking.wandb.tags.0: holds half a character (\\ud83d)"),
        ("ema: 0.99", "ema: 0.99 is not a section; its keys are decay"),
        ("hub: {repo_id: x}", "hub.repo_id: 'x' cannot name a repository; write user/name, of letters, digits, '.'"),
        ("hub: {repo_id: me/a--b}", "hub.repo_id: 'me/a--b' cannot name a repository; write user/name"),
        (
            "hub: {push: end}",
            "hub: push is end but repo_id is null: name the repository, such as user/name, or set hub",
        ),
        ("hub: {push: always}", "hub.push: 'always' is not one of: end, checkpoint, never"),
        ("flow: {shift: high}", "flow.shift: 'high' is neither 'model' or 'resolution' nor a number"),
        ("flow: {shift: 0}", "flow.shift: 0 is too small; must be above 0"),
        (
            "flow: {timesteps: {kind: normal}}",
            "flow.timesteps.kind: 'normal' is not one of: logit_normal, uniform",
        ),
        ("flow: {timesteps: {kind: [a]}}", "flow.timesteps.kind: ['a'] is not one of: logit_normal, uniform"),
        ("flow: {timesteps: 5}", "flow.timesteps: 5 is not a section; its keys are kind, mean, std"),
        ("flow: {timesteps: {std: 0}}", "flow.timesteps.std: 0 is too small; must be above 0"),
        (
            "flow: {weighting: {gamma: 5}}",
            "flow.weighting.gamma: unknown key with kind none; it belongs to kind min_snr",
        ),
        ("optimizer: {lr: .inf}", "optimizer.lr: inf is not a finite number"),
        ("optimizer: {lr: '1e-4'}", "optimizer.lr: '1e-4' is not a number"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas: [0.9] has 1 entry; at least 2"),
        ("optimizer: {betas: [0.9, 1]}", "optimizer.betas.1: 1 is too large; must be below 1"),
        ("preview: {prompts: ['']}", "preview.prompts.0: is empty"),
        ("config_version: true", "config_version: true is not an integer"),
        ("config_version: 0", "config_version: 0 is too small; at least 1"),
        ("name: !!python/name:os.system x", "name: the tag !!python/name:os.system is not allowed"),
        ("name: a\nname: b", "name: duplicate key; it is already on line 3"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_given_and_what_is_allowed(lines: str, problem: str) -> None:
    (found,) = problems(f"# a comment\n{MINIMAL}{lines}\n")
    line = 2 + len(lines.splitlines())
    assert found.startswith(f"run.yaml:{line}: {problem}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name: x", "run.yaml: data: missing; for example `data: {sources: [{path: ./photos"),
        ("name: x\ndata: {}", "run.yaml:2: data.sources: missing; for example `sources: [{path:"),
        (
            "data:\n  sources:\n  - caption: x",
            "run.yaml:3: data.sources.0.path: missing; for example `path: ./photos`",
        ),
        ("data:\n  sources: []", "run.yaml:2: data.sources: [] has 0 entries; at least 1; for example"),
        ("data:\n  sources: [{path: ''}]", "run.yaml:2: data.sources.0.path: is empty; for example"),
        (
            "data:\n  sources: [./dog]",
            "run.yaml:2: data.sources.0: './dog' is not a section; its keys are kind, path,",
        ),
        (
            "data:\n  sources: [{path: a}]\n  resolution: 1000",
            "run.yaml:3: data.resolution: 1000 must be a multiple of 16",
        ),
        ("data:\n  sources: [{path: a}]\n  flip: yes", "run.yaml:3: data.flip: 'yes' is not true or false"),
        ("", "run.yaml: is empty"),
        ("# only a comment", "run.yaml: is empty"),
        ("- a", "run.yaml:1: a configuration consists of lines such as"),
        ("just text", "run.yaml:1: a configuration consists of lines such as"),
        ("name: x\n\tseed: 1", "run.yaml:2: a tab cannot indent"),
    ],
)
def test_a_file_that_lacks_something_says_what(text: str, problem: str) -> None:
    (found,) = problems(text)
    assert found.startswith(problem)


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    found = problems(
        "train:\n  steps: x\nname: 5\ndata:\n  sources: [{path: a}]\n  flop: true\nname: y\n", "seed=-1", "x"
    )
    assert [problem.split(": ")[0] for problem in found] == [
        "run.yaml:2",
        "run.yaml:3",
        "run.yaml:6",
        "run.yaml:7",
        "override seed=-1",
        "override x",
    ]


def test_a_problem_between_two_keys_has_the_line_of_the_first() -> None:
    (found,) = problems(MINIMAL + "train:\n  steps: 10\nschedule:\n  warmup_steps: 10\n")
    assert found.startswith("run.yaml:5: schedule.warmup_steps is 10 but train.steps is 10")


def test_the_length_is_in_steps_or_in_epochs() -> None:
    assert load(MINIMAL).train.steps == 1000
    assert load(MINIMAL + "train: {steps: 5, epochs: null}\n").train.total_steps == 5
    for text in ("epochs: 2.5", "epochs: 2.5, steps: null"):
        train = load(MINIMAL + f"train: {{{text}}}\n").train
        assert (train.steps, train.epochs) == (None, 2.5)
    with pytest.raises(ValueError, match="not been resolved"):
        _ = train.total_steps


def test_steps_and_epochs_together_are_refused_by_name() -> None:
    (found,) = problems(MINIMAL + "train:\n  epochs: 2.0\n  steps: 10\n")
    assert found.startswith("run.yaml:4: train.steps is 10 and train.epochs is 2: both set the length of training")
    (found,) = problems(MINIMAL + "train: {steps: 10}\n", "train.epochs=2.0")
    assert "train.steps is 10 and train.epochs is 2" in found
    (found,) = problems(MINIMAL + "train: {steps: null}\n")
    assert "train.steps and train.epochs are both null" in found


def test_a_newer_version_says_to_upgrade_and_nothing_else() -> None:
    (found,) = problems("config_version: 2\nsomething_new: 1\n")
    assert found.startswith("run.yaml:1: config_version 2 is newer")
    assert "pip install --upgrade sd3tune" in found


def test_a_variant_without_a_kind_is_the_default_one() -> None:
    config = load(MINIMAL + "flow: {timesteps: {mean: 0.5}}\nschedule: {warmup_steps: 3}\n")
    assert config.flow.timesteps.kind == "logit_normal"
    assert config.schedule.kind == "constant"


def test_a_misspelt_file_gets_a_suggestion() -> None:
    Path("dreambooth.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError) as caught:
        load_config("dreambooht.yaml")
    assert caught.value.problems == ("dreambooht.yaml does not exist; did you mean dreambooth.yaml?",)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"name: a\nseed: \xe9\n", "run.yaml:2: byte 0xe9 is not UTF-8"),
        (b"PK\x03\x04\x00\x00", "run.yaml: holds binary data, not text"),
        (MINIMAL.encode("utf-16-le"), "run.yaml: looks like UTF-16; save it as UTF-8"),
        (b"# " + b"x" * (1 << 20), "run.yaml is not a configuration: it is larger than 1 MiB"),
    ],
)
def test_a_file_that_is_no_text_is_one_line(content: bytes, problem: str) -> None:
    Path("run.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_config("run.yaml")
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(problem)


def test_utf_16_with_its_mark_is_read() -> None:
    Path("run.yaml").write_bytes((MINIMAL + "name: a # café\n").encode("utf-16"))
    assert load_config("run.yaml").config.name == "a"


def test_a_folder_or_nothing_in_place_of_a_file() -> None:
    Path("configs").mkdir()
    Path("configs/a.yaml").write_text(MINIMAL)
    with pytest.raises(ConfigError, match=r"^configs is a folder; name a YAML file in it, such as a\.yaml$"):
        load_config("configs")
    with pytest.raises(ConfigError, match=r"neither does the folder nowhere$"):
        load_config("nowhere/a.yaml")


def test_a_byte_order_mark_and_windows_lines_are_read() -> None:
    Path("run.yaml").write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode() + b"name: caf\r\nseed: 3\r\n")
    assert load_config("run.yaml").config.seed == 3


def test_paths_in_a_file_are_relative_to_it_and_in_overrides_to_the_working_directory(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "run.yaml").write_text(
        "output_dir: out\nmodel: {base: ../base}\n"
        "data: {cache_dir: ~/cache, sources: [{path: dog}, {path: /abs/cat}]}\n"
    )
    config = load_config("configs/run.yaml").config
    assert config.output_dir == str(folder / "out")
    assert config.model.base == str(tmp_path / "base")
    assert config.data.cache_dir == os.path.expanduser("~/cache")
    assert [source.path for source in config.data.sources] == [str(folder / "dog"), "/abs/cat"]

    overrides = ["data.sources.0.path=dog", "output_dir=out", "model.base=./base", "data.cache_dir=cache"]
    config = load_config("configs/run.yaml", overrides).config
    assert config.data.sources[0].path == str(tmp_path / "dog")
    assert config.output_dir == str(tmp_path / "out")
    assert config.model.base == str(tmp_path / "base")
    assert config.data.cache_dir == str(tmp_path / "cache")

    config = load_config("configs/run.yaml", ["data.sources=[{path: dog}]"]).config
    assert config.data.sources[0].path == str(tmp_path / "dog")


def test_without_an_output_dir_the_run_folder_is_named_after_the_run(tmp_path: Path) -> None:
    assert load(MINIMAL + "name: rex").output_dir == str(tmp_path / "runs" / "rex")
    assert load(MINIMAL).output_dir == str(tmp_path / "runs" / "my-lora")


def test_a_base_is_a_folder_only_where_one_is_meant(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "my" / "base").mkdir(parents=True)
    bases = {
        "tiny": "tiny",
        "./tiny": str(tmp_path / "tiny"),
        "my/base": str(tmp_path / "my" / "base"),
        "owner/name": "owner/name",
        "~/base": os.path.expanduser("~/base"),
        "/base": "/base",
    }
    for written, resolved in bases.items():
        assert load(MINIMAL + f"model: {{base: {written}}}").model.base == resolved


def test_plain_values_are_checked_like_a_file(tmp_path: Path) -> None:
    values = {"data": {"sources": [{"path": "dog"}]}, "train": {"steps": 5}}
    config = parse_config(values, ["train.steps=7"], folder="/photos").config
    assert config.data.sources[0].path == "/photos/dog"
    assert config.train.steps == 7
    assert values["train"] == {"steps": 5}
    with pytest.raises(ConfigError) as caught:
        parse_config({**values, "traim": 1})
    assert caught.value.problems == ("config: traim: unknown key; did you mean 'train'?",)


def test_loading_imports_neither_torch_nor_numpy() -> None:
    code = "import sys, sd3tune.config; print(sorted({'torch', 'numpy', 'diffusers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_run_in_a_folder_whose_name_is_not_utf_8_has_a_configuration_that_loads(tmp_path: Path) -> None:
    values = {"data": {"sources": [{"path": str(tmp_path)}]}, "output_dir": "run"}
    config = parse_config(values, folder=tmp_path / "caf\udce9").config
    Path("config.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config("config.yaml").config == config
    assert config.output_dir == str(tmp_path / "caf\udce9" / "run")
    with pytest.raises(ConfigError, match=r"data.sources.0.path: .* is not UTF-8; rename the folder"):
        parse_config({"data": {"sources": [{"path": "photos"}]}}, folder="caf\udce9")
