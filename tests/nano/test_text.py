"""nano's text encoders: captions know what they say, every word is one token, and training makes them readable."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from examples.nano import captions as captions_module
from examples.nano.captions import OWNERS, SLOTS, Caption, paraphrase, plain_caption, random_caption
from examples.nano.probe_text_encoders import exams_of, probe, table
from examples.nano.text_encoders import CLIP_LENGTH, ENCODERS, OWN, T5_LENGTH, load_tokenizer, tokenize, write_tokenizer
from examples.nano.train_text_encoders import make_encoder
from sd3tune.model.base.base import Base
from sd3tune.model.load.components import load_text_encoder
from sd3tune.model.load.text import assemble
from sd3tune.nano.world import Scene, Thing, held_out, parse, random_scene

PAIR = Scene("blue", Thing("red", "circle"), relation="above", other=Thing("green", "star", size="small"))
ODD_TEXTS = ["", "a photo of sks dog", "Café! 犬 [unusual], blargh-7", "a red circle " * 30]
CONFUSABLE = ("a red circle on a blue background", "a blue circle on a red background")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("tokenizers")
    for encoder in ENCODERS:
        write_tokenizer(encoder, folder / encoder)
    return {encoder: load_tokenizer(encoder, folder / encoder) for encoder in ENCODERS}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    """Encoders that were trained for some seconds, and their losses."""
    folder = tmp_path_factory.mktemp("parts")
    return folder, {encoder: make_encoder(encoder, folder, 60, 0, captions=500, batch_size=16) for encoder in ENCODERS}


def test_every_word_is_one_token(tokenizers: dict[str, Any]) -> None:
    words = Path(captions_module.__file__).with_name("words.txt").read_text(encoding="utf-8").split()
    assert len(words) == len(set(words))
    for tokenizer in tokenizers.values():
        ids = [tokenizer(word, add_special_tokens=False).input_ids for word in words]
        assert {word: len(token) for word, token in zip(words, ids, strict=True) if len(token) != 1} == {}
        assert len({token for (token,) in ids}) == len(words)


def test_the_vocabulary_has_all_that_captions_say(tokenizers: dict[str, Any]) -> None:
    said = {word for values in SLOTS.values() for value in values for word in value.split()}
    for tokenizer in tokenizers.values():
        assert all(len(tokenizer(word, add_special_tokens=False).input_ids) == 1 for word in said)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_unknown_words_fall_to_letters_that_tell_them_apart(tokenizers: dict[str, Any], encoder: str) -> None:
    tokenizer = tokenizers[encoder]
    unknown = [tuple(tokenizer(word, add_special_tokens=False).input_ids) for word in ("blargh", "blarhg", "café")]
    assert len(set(unknown)) == 3
    assert tokenizer.unk_token_id not in {token for tokens in unknown for token in tokens}


def test_plain_telling_is_the_worlds_own_caption() -> None:
    chance = random.Random(0)
    for scene in [PAIR, *(random_scene(chance) for _ in range(300))]:
        told = plain_caption(scene)
        assert told.text == scene.caption
        said = {slot: value for slot, (_, value) in told.slots.items()}
        thing = Thing(*(said.get(slot, "") for slot in ("colour", "shape", "size", "texture")))
        other = Thing(*(said.get(f"other_{slot}", "") for slot in ("colour", "shape", "size", "texture")))
        relation = said.get("relation", "")
        again = Scene(
            said.get("background", ""), thing, said.get("place", ""), relation, other if scene.other else None
        )
        assert again == scene == parse(told.text)


def test_free_telling_says_no_more_than_its_words_do() -> None:
    chance = random.Random(0)
    told = [paraphrase(PAIR, chance) for _ in range(500)]
    assert len({caption.text for caption in told}) > 300
    for caption in told:
        assert len(caption.words) == len(caption.owners)
        for slot in ("background", "other_colour", "relation"):
            if slot in caption.slots:
                index, value = caption.slots[slot]
                assert caption.words[index].lower() == value.split()[-1]
        assert caption.slots.get("background", (0, "blue"))[1] == "blue"
    assert any("sks" in caption.words and caption.slots["name"][1] == "sks" for caption in told)


def test_training_captions_never_say_a_held_out_combination() -> None:
    chance = random.Random(0)
    told = {asked: [random_caption(chance, asked) for _ in range(3000)] for asked in (False, True)}
    assert not any(says_held_out(caption, prefix) for caption in told[False] for prefix in ("", "other_"))
    assert sum(says_held_out(caption, "") for caption in told[True]) > 1000


def says_held_out(caption: Caption, prefix: str) -> bool:
    said = {slot: value for slot, (_, value) in caption.slots.items()}
    thing = Thing(said.get(f"{prefix}colour", ""), said.get(f"{prefix}shape", ""))
    return held_out(thing, said.get("background", ""))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_captions_become_what_the_tokenizer_makes_of_their_text(tokenizers: dict[str, Any], encoder: str) -> None:
    tokenizer, chance = tokenizers[encoder], random.Random(0)
    told = [random_caption(chance) for _ in range(300)]
    for length in {T5_LENGTH, CLIP_LENGTH} if encoder == "t5" else {CLIP_LENGTH}:
        batch = tokenize(told, encoder, tokenizer).batch(torch.arange(len(told)), length)
        texts = [caption.text for caption in told]
        expected = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        assert torch.equal(batch.ids, expected.input_ids)
        assert (batch.ids[torch.arange(len(told)), batch.ends] == tokenizer.eos_token_id).all()


def test_a_causal_encoder_is_asked_only_for_what_was_said_so_far(tokenizers: dict[str, Any]) -> None:
    told = plain_caption(PAIR)
    noun = told.words.index("star")
    for encoder, first in (("clip_l", 1), ("t5", 0)):
        batch = tokenize([told], encoder, tokenizers[encoder]).batch(torch.tensor([0]), T5_LENGTH + 2)
        own = [SLOTS[slot][answer] for slot, answer in zip(OWN, batch.own[0, first + noun].tolist(), strict=True)]
        assert own == ["green", "star", "small", "", ""]
        assert OWNERS[batch.owners[0, first + noun]] == "other"
        early = [SLOTS[slot][answer] for slot, answer in zip(OWN, batch.own[0, first + noun - 2].tolist(), strict=True)]
        assert early == (["", "", "small", "", ""] if encoder == "clip_l" else own)
        last = dict(zip(SLOTS, batch.whole[0].tolist(), strict=True))
        assert SLOTS["background"][last["background"]] == "blue"


def test_what_is_cut_off_is_not_asked_for(tokenizers: dict[str, Any]) -> None:
    batch = tokenize([plain_caption(PAIR)], "t5", tokenizers["t5"]).batch(torch.tensor([0]), 6)
    said = {slot: SLOTS[slot][answer] for slot, answer in zip(SLOTS, batch.whole[0].tolist(), strict=True) if answer}
    assert said == {"colour": "red", "shape": "circle", "relation": "above"}


def test_training_lowers_the_loss(trained: tuple[Path, dict[str, list[float]]]) -> None:
    for encoder, losses in trained[1].items():
        assert sum(losses[-5:]) < 0.6 * sum(losses[:5]), encoder


def test_the_result_conditions_as_the_real_encoders_do(trained: tuple[Path, dict[str, list[float]]]) -> None:
    base = Base("parts", "folder", trained[0])
    encoders = {name: load_text_encoder(base, name, torch.float32, max_sequence_length=T5_LENGTH) for name in ENCODERS}
    assert encoders["clip_l"].model.config.hidden_act == "quick_gelu"
    assert encoders["clip_g"].model.config.hidden_act == "gelu"
    assert encoders["clip_l"].tokenizer.pad_token == encoders["clip_l"].tokenizer.eos_token
    assert encoders["clip_g"].tokenizer.pad_token == "!"
    texts = [*ODD_TEXTS, *CONFUSABLE]
    entries = {
        name: {key: torch.stack([entry[key] for entry in read]) for key in read[0]}
        for name, read in ((name, encoder.encode(texts)) for name, encoder in encoders.items())
    }
    embeds, pooled = assemble(entries["clip_l"], entries["clip_g"], entries["t5"]["hidden"], T5_LENGTH, 128)
    assert embeds.shape == (len(texts), CLIP_LENGTH + T5_LENGTH, 128)
    assert pooled.shape == (len(texts), 112)
    assert embeds.isfinite().all()
    assert not torch.allclose(pooled[-1], pooled[-2], atol=1e-3)


def test_the_parts_are_diffusers_folders_of_safetensors(trained: tuple[Path, dict[str, list[float]]]) -> None:
    weights = 0
    for encoder, (tokenizer, folder) in ENCODERS.items():
        assert (trained[0] / tokenizer / "tokenizer_config.json").is_file()
        assert {file.name for file in (trained[0] / folder).iterdir()} >= {"config.json", "model.safetensors"}
        model_class = T5EncoderModel if encoder == "t5" else CLIPTextModelWithProjection
        model = model_class.from_pretrained(trained[0] / folder)
        weights += sum(parameter.numel() for parameter in model.parameters())
    assert 2 * weights < 3e6  # bytes in fp16


def test_probes_tell_what_can_be_read(trained: tuple[Path, dict[str, list[float]]]) -> None:
    accuracies = probe(trained[0], torch.float16, captions=200, fitting_steps=10)
    assert accuracies["t5 words"]["shape"] > 0.35  # guessing: about one in six
    assert all(0 <= share <= 1 for read in accuracies.values() for share in read.values())
    assert next(iter(accuracies)) == "pooled"
    assert "| other colour |" in table(accuracies)


def test_t5_alone_is_excused_from_what_its_length_cuts_off(trained: tuple[Path, dict[str, list[float]]]) -> None:
    exams = exams_of(trained[0], torch.float32, captions=300, held_out=True)
    answers = {source: (exams[source].answers > 0).sum() for source in ("pooled", "clip_l last", "t5 last")}
    assert answers["pooled"] == answers["clip_l last"] > answers["t5 last"]
