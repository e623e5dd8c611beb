"""The limits of a base's configurations: every known base passes, and what no base can be is named by its key."""

import json
from pathlib import Path
from typing import Any

import pytest

from sd3tune.errors import ModelError
from sd3tune.model.base.offline import offline_folder
from sd3tune.model.base.part_configs import PARTS, check_config
from sd3tune.model.base.parts import COMMON, CONFIGS, VARIANTS

FOLDERS = {part: COMMON / part for part in PARTS} | {"transformer": CONFIGS / "sd35-medium" / "transformer"}
ODD: tuple[Any, ...] = (None, [1], {}, "1", -1, 0, 1.5, True, 10**9, 1e9)
COUNTS = {
    "transformer": ("num_layers", "num_attention_heads", "in_channels", "joint_attention_dim", "pos_embed_max_size"),
    "vae": ("latent_channels", "layers_per_block", "norm_num_groups", "sample_size"),
    "text_encoder": ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
    "text_encoder_3": ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads"),
    "scheduler": ("num_train_timesteps", "base_image_seq_len"),
}


def config_in(folder: Path) -> dict[str, Any]:
    (file,) = folder.glob("*config.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("base", ["tiny", "tiny-sd3", "tiny-sd35-large", "nano", *VARIANTS])
def test_every_known_base_is_within_the_limits(base: str) -> None:
    root = CONFIGS / base if base in VARIANTS else offline_folder(base)
    for part in PARTS:
        folder = root / part
        check_config("x", part, config_in(folder if folder.is_dir() else COMMON / part))


@pytest.mark.parametrize(("part", "key"), [(part, key) for part, keys in COUNTS.items() for key in keys])
def test_a_number_that_counts_something_has_a_type_and_limits(part: str, key: str) -> None:
    config = config_in(FOLDERS[part])
    for odd in ODD:
        with pytest.raises(ModelError) as caught:
            check_config("c.json", part, {**config, key: odd})
        assert any(line.startswith(f"c.json: {key}: ") for line in caught.value.problems), odd
        assert all(len(line) < 250 and "\n" not in line for line in caught.value.problems)


@pytest.mark.parametrize("part", PARTS)
def test_a_key_that_the_program_needs_is_missed_by_its_name(part: str) -> None:
    config = config_in(FOLDERS[part])
    required = [key for key, field in PARTS[part].model_fields.items() if field.is_required()]
    for key in required:
        with pytest.raises(ModelError, match=rf"^c: {key}: missing"):
            check_config("c", part, {other: value for other, value in config.items() if other != key})


@pytest.mark.parametrize(
    ("part", "values", "key"),
    [
        ("transformer", {"out_channels": 8}, "out_channels"),
        ("transformer", {"caption_projection_dim": 1152}, "caption_projection_dim"),
        ("transformer", {"dual_attention_layers": [0, 24]}, "dual_attention_layers"),
        ("transformer", {"dual_attention_layers": None}, "dual_attention_layers"),
        ("transformer", {"qk_norm": "layer_norm"}, "qk_norm"),
        ("transformer", {"num_attention_heads": 256, "attention_head_dim": 1024}, "num_attention_heads"),
        ("vae", {"block_out_channels": [128, 256, 512]}, "block_out_channels"),
        ("vae", {"block_out_channels": [128, 256, 512, 520]}, "norm_num_groups"),
        ("vae", {"down_block_types": ["X"] * 4}, "down_block_types.0"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("vae", {"scaling_factor": float("nan")}, "scaling_factor"),
        ("text_encoder", {"num_attention_heads": 7}, "num_attention_heads"),
        ("text_encoder_2", {"num_labels": 10**9}, "num_labels"),
        ("text_encoder", {"dtype": "load"}, "dtype"),
        ("scheduler", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "use_beta_sigmas"),
        ("scheduler", {"time_shift_type": "x"}, "time_shift_type"),
    ],
)
def test_values_that_no_model_has_or_that_do_not_agree_are_refused(part: str, values: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelError, match=rf"^c: {key}: "):
        check_config("c", part, config_in(FOLDERS[part]) | values)
