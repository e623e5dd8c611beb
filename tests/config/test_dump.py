"""A dumped configuration loads back to the same configuration."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from sd3tune.config import Config, dump_config, load_config, parse_config
from sd3tune.config.sections.data import DatasetSource
from sd3tune.config.sections.method import LycorisSection
from sd3tune.config.sections.model import ModelConfig, TextEncodersConfig
from sd3tune.config.sections.section import Section
from sd3tune.config.sections.text_encoders import EncoderLoraConfig
from sd3tune.config.shape import alternatives, item_of, sections_of
from sd3tune.config.yaml12 import parse

TEXT = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
    st.sampled_from(
        [
            "no",
            "on",
            "1e-4",
            "0o7",
            "010",
            "1_000",
            "~",
            "null",
            "a: b",
            "a #b",
            "- a",
            "!x",
            "2024-01-01",
            ".inf",
        ]
    ),
    st.sampled_from(
        [
            " a ",
            "a\nb",
            "tab\there",
            "'",
            '"',
            "\u2028",
            "\x85",
            "\ufeff",
            "\x7f",
            "=",
            "<<",
            "%x",
            "...",
            "---",
        ]
    ),
)


def configs() -> st.SearchStrategy[Config]:
    """Configurations drawn from the schema itself; the few that break a rule between keys are left out."""
    return section(Config).map(_consistent).map(_valid).filter(bool)  # type: ignore[arg-type,return-value]


def _consistent(values: dict[str, Any]) -> dict[str, Any]:
    """Only new weights have a shape of their own; they are trained whole, and there is nothing that they knew."""
    _of_one_way(values["data"])
    model, sources = values["model"], values["data"]["sources"]
    if model["init"] == "random":
        values["method"] = {"kind": "full", "export_dtype": "bf16"}
        values["data"]["sources"] = [{**source, "prior": None, "outside_target": "image"} for source in sources]
    else:
        model["transformer"] = None
    if values["method"]["kind"] == "full":
        model["quantize"], values["data"]["export_tags"] = "none", False
        values["train"]["swap_blocks"] = None
    method, timesteps = values["method"], values["flow"]["timesteps"]
    if method.get("rank") == "auto":
        method |= {"budget_mb": 1.5, "rank_pattern": {}, "start_from": None}
    elif "budget_mb" in method:
        method["budget_mb"] = None
    if method.get("text_encoders") and not any(method["text_encoders"].values()):
        method["text_encoders"] = None
    if timesteps.get("shares"):
        timesteps["shares"] = [1.5] * len(timesteps["parts"])
    if values["train"]["sharding"] == "fsdp":  # beside few others; see `sharding_problem`
        values["eval"] = values["train"]["memory"] = values["train"]["swap_blocks"] = None
        model["quantize"], values["train"]["compile"], values["train"]["fused_backward"] = "none", "none", False
        values["optimizer"] = {"kind": "adamw"}
    if values["train"]["gradient_checkpointing"] == "selective":
        values["train"]["compile"] = "none"
    if values["train"]["gradient_checkpointing"] == "none":
        values["train"]["checkpointed_blocks"] = None
    if values["train"]["max_grad_norm"] is not None or values["train"]["gradient_accumulation"] > 1:
        values["train"]["fused_backward"] = False
    if values["optimizer"]["kind"] == "prodigy":
        values["train"]["fused_backward"] = False
    if values["flow"]["timesteps"]["kind"] == "cosmap":
        values["flow"]["weighting"] = {"kind": "none"}
    if values["eval"] is None:
        values["checkpoint"]["best"] = "loss"
    if (values["train"]["steps"] is None) == (values["train"]["epochs"] is None):
        values["train"] |= {"steps": 1000, "epochs": None}
    values["schedule"]["warmup_steps"] = min(values["schedule"]["warmup_steps"], (values["train"]["steps"] or 1) - 1)
    if values["preview"]["guidance"] <= 1:
        values["preview"]["guidance"] = 2.5
    return values


def _of_one_way(data: dict[str, Any]) -> None:
    """All sources are streams, as the first one is, or none is."""
    first = data["sources"][0]
    if first["kind"] == "webdataset" or first.get("streaming"):
        only = {"repeats": 1, "masks": None, "max_samples": None, "resolution": None, "prior": None}
        alike = [one for one in data["sources"] if one["kind"] == first["kind"]]
        data |= {"balance": None, "resolution": 512, "sources": [{**one, **only} for one in alike]}
    else:
        data |= {"stream": None, "sources": [one for one in data["sources"] if one["kind"] != "webdataset"]}
    for source in data["sources"]:
        if "streaming" in source:
            source["streaming"] = bool(first.get("streaming"))


def _valid(values: dict[str, Any]) -> Config | None:
    try:
        return Config.model_validate(values)
    except ValidationError:
        return None


def section(kind: type[Section]) -> st.SearchStrategy[dict[str, Any]]:
    special = {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "resolution": st.integers(1, 256).map(lambda n: 16 * n),
        "path": st.sampled_from(["/photos/no", "/a b/1e-4", "/'"]),
        "cache_dir": st.sampled_from([None, "/cache"]),
        "output_dir": st.sampled_from(["/out", "/#1"]),
        # As written, and such that the rules between keys hold.
        "targets": st.sampled_from(["attention", "attention+mlp", "re:.*to_q", ["attn.to_q", "re:x"]]),
        "blocks": st.sampled_from([None, [0], ["0-11", 3], ["7-7"]]),
        "factor": st.sampled_from([-1, 2, 8]),
        "encoders": st.sampled_from([{}, {"dinov2": "/dino #1", "clip": "owner/name"}]),
        "size": st.sampled_from([None, 1024, "1152x896"]),
        "slg_start": st.floats(0, 0.4),
        "slg_stop": st.floats(0.5, 1),
        "rank_pattern": st.dictionaries(TEXT.filter(lambda text: not text.startswith("re:")), st.integers(1, 1024)),
        "alpha_pattern": st.dictionaries(st.sampled_from(["attn.to_q", "re:.*\\.0\\..*"]), st.floats(0.5, 100)),
        "init": st.sampled_from([True, "gaussian", "eva"]),
        "start_from": st.sampled_from([None, "/runs/a b"]),
        "holdout": st.sampled_from([0, 3, "/held out"]),
        "trigger": st.sampled_from([None, "sks", "no", "a: b #c"]),
        "repo_id": st.just("owner/name"),
        "min_sigma": st.floats(0, 0.4),
        "max_sigma": st.floats(0.5, 1),
        "shift": st.one_of(st.sampled_from(["model", "resolution"]), st.floats(0.01, 100)),
        "memory": st.one_of(st.sampled_from([None, "auto"]), st.floats(0.01, 1000)),
        "base": st.sampled_from(["tiny", "owner/name", "/abs: folder"]),
        "tokenizers": st.sampled_from([None, "owner/name", "/abs: folder"]),
        "balance": st.sampled_from([None, "equal"]),
        "sharding": st.sampled_from(["none", "fsdp"]),  # the others are only refused
        "masks": st.sampled_from([None, "alpha", "off", "/masks: a"]),
    }
    if kind is DatasetSource:
        special["masks"] = st.sampled_from([None, "alpha", "off"])
    if kind is ModelConfig:
        special["init"] = st.sampled_from(["pretrained", "random"])
    if issubclass(kind, LycorisSection):
        special["init"] = st.sampled_from([True, "lycoris"])
    if "budget_mb" in kind.model_fields:
        special["rank"] = st.one_of(st.just("auto"), st.integers(1, 1024))
    if "t5_caption" in kind.model_fields:
        special |= {"token": st.sampled_from(["<thing>", "no", "#1"]), "init": TEXT.filter(str.strip)}
    if kind is EncoderLoraConfig:
        special["targets"] = st.sampled_from(["attention", "attention+mlp"])
    if kind is TextEncodersConfig:
        special = dict.fromkeys(kind.model_fields, st.sampled_from([None, "/clip #1.safetensors"]))
    return st.fixed_dictionaries(
        {
            name: special[name] if name in special else values(field.annotation, field.metadata)
            for name, field in kind.model_fields.items()
        }
    )


def values(annotation: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    item = item_of(annotation)
    strategies = [section(one) for one in sections_of(annotation)]
    for kind in alternatives(annotation):
        if kind is str:
            strategies.append(TEXT)
        elif kind in (int, float, bool, type(None)):
            strategies.append(number(kind, metadata))
        elif get_origin(kind) is list:
            inner = get_args(item)[1:] if get_origin(item) is not None else ()
            limits = [limit for info in inner if isinstance(info, FieldInfo) for limit in info.metadata]
            least = max((m.min_length for m in metadata if hasattr(m, "min_length")), default=1)
            length = (
                {"min_size": 2, "max_size": 2}
                if any(hasattr(m, "max_length") for m in metadata)
                else {"min_size": least}
            )
            strategies.append(st.lists(values(item, limits), **{"max_size": 3, **length}))
        elif not (isinstance(kind, type) and issubclass(kind, Section)):
            strategies.append(st.sampled_from(get_args(kind)))  # Literal
    return st.one_of(strategies)


def number(kind: Any, metadata: list[Any]) -> st.SearchStrategy[Any]:
    low = next((m.ge for m in metadata if hasattr(m, "ge")), next((m.gt for m in metadata if hasattr(m, "gt")), None))
    high = next((m.le for m in metadata if hasattr(m, "le")), next((m.lt for m in metadata if hasattr(m, "lt")), None))
    if kind is int:
        return st.integers(low, min(high if high is not None else 10**30, 2**63 - 1) if high is not None else None)
    if kind is float:
        return st.floats(
            0.0 if low is None else low,
            high,
            allow_infinity=False,
            exclude_min=any(hasattr(m, "gt") for m in metadata),
            exclude_max=any(hasattr(m, "lt") for m in metadata),
        )
    return st.booleans() if kind is bool else st.none()


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(config=configs())
def test_load_of_dump_is_the_same_configuration(tmp_path: Path, config: Config) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path).config == config


@pytest.mark.long
@pytest.mark.long
@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_every_text_survives_in_yaml_1_1_and_1_2(text: str) -> None:
    config = parse_config({"data": {"sources": [{"path": "/x", "caption": text}]}}).config
    dumped = dump_config(config)
    assert parse(dumped).value["data"]["sources"][0]["caption"] == text
    assert yaml.safe_load(dumped)["data"]["sources"][0]["caption"] == text


def test_the_dump_has_every_key_in_the_order_of_the_schema() -> None:
    config = parse_config({"data": {"sources": [{"path": "x"}]}}).config
    dumped = parse(dump_config(config)).value
    assert list(dumped) == list(Config.model_fields)
    assert list(dumped["train"]) == list(type(config.train).model_fields)


def test_the_dump_describes_the_same_run_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("data: {sources: [{path: dog}]}")
    config = load_config("run.yaml", ["model.base=./base"]).config
    monkeypatch.chdir("there")
    Path("config.yaml").write_text(dump_config(config))
    assert load_config("config.yaml").config == config
    assert os.path.isabs(config.output_dir or "")
