import re
import weakref
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from sd3tune.data.records import Record
from sd3tune.data.store import Store
from sd3tune.encode import captions, resources
from sd3tune.encode.captions import encode_captions
from sd3tune.errors import RunError
from sd3tune.model.base.parts import ENCODERS
from sd3tune.model.load.components import load_pipeline, transformer_config
from sd3tune.model.load.text import TextEncoder, assemble

TEXTS = ["a photo of sks dog", "", "two cats, on a  mat! (detailed)", "ein Hund, müde " * 30]


def encode(base, store, texts=TEXTS, length=77, dtype=torch.float32, **more):
    return encode_captions(base, texts, store, dtype=dtype, max_sequence_length=length, **more)


def assembled(base, store, keys, text, length):
    entry = {
        encoder: {name: tensor[None] for name, tensor in store.get(keys[encoder][text]).items()} for encoder in keys
    }
    joint_dim = transformer_config(base)["joint_attention_dim"]
    return assemble(entry["clip_l"], entry["clip_g"], entry["t5"]["hidden"], length, joint_dim)


@pytest.fixture
def encoded(monkeypatch):
    """(encoder, text) of every text that really went through an encoder."""
    calls = []
    genuine = TextEncoder.encode

    def noted(self, texts):
        calls.extend((self.name, text) for text in texts)
        return genuine(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", noted)
    return calls


@pytest.fixture(scope="module")
def pipeline(base):
    return load_pipeline(base, torch.float32)


@pytest.mark.parametrize("length", [77, 154, 256])
def test_stored_embeddings_equal_the_pipelines_bit_for_bit(base, pipeline, tmp_path, length):
    store = Store(tmp_path)
    keys, _ = encode(base, store, length=length)
    for text in TEXTS:
        with torch.no_grad():
            expected, _, expected_pooled, _ = pipeline.encode_prompt(
                text, None, None, do_classifier_free_guidance=False, max_sequence_length=length
            )
        found, pooled = assembled(base, Store(tmp_path), keys, text, length)
        assert torch.equal(found, expected)
        assert torch.equal(pooled, expected_pooled)


def test_a_batch_through_the_pipeline_agrees_closely(base, pipeline, tmp_path):
    store = Store(tmp_path)
    keys, _ = encode(base, store)
    with torch.no_grad():
        expected, _, expected_pooled, _ = pipeline.encode_prompt(
            TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=77
        )
    for row, text in enumerate(TEXTS):
        found, pooled = assembled(base, store, keys, text, 77)
        assert torch.allclose(found[0], expected[row], atol=1e-5, rtol=0)
        assert torch.allclose(pooled[0], expected_pooled[row], atol=1e-5, rtol=0)


def test_one_encoder_is_alive_at_a_time_and_none_afterwards(base, tmp_path, monkeypatch):
    genuine, models = captions.load_text_encoder_in, []

    def watched(*args, **kwargs):
        assert all(model() is None for model in models)
        loaded = genuine(*args, **kwargs)
        models.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(captions, "load_text_encoder_in", watched)
    encode(base, Store(tmp_path))
    assert len(models) == 3
    assert all(model() is None for model in models)


def test_what_is_stored_is_reused_without_loading_an_encoder(base, tmp_path, monkeypatch):
    first, report = encode(base, Store(tmp_path))
    assert report.summary().startswith("captions: 4 texts x 3 encoders, all new, ")
    monkeypatch.setattr(captions, "load_text_encoder_in", None)
    again, report = encode(base, Store(tmp_path), texts=[*TEXTS, TEXTS[0]])
    assert again == first
    assert report.summary() == "captions: 4 texts x 3 encoders, all reused"
    assert (report.encoded, report.reused, report.nbytes) == (0, 4, 0)


def test_another_t5_length_encodes_t5_alone(base, tmp_path, encoded):
    before, _ = encode(base, Store(tmp_path), length=77)
    encoded.clear()
    after, report = encode(base, Store(tmp_path), length=154)
    assert encoded == [("t5", text) for text in TEXTS]
    assert before["clip_l"] == after["clip_l"]
    assert before["clip_g"] == after["clip_g"]
    assert report.summary() == "captions: 4 of 4 re-encoded: the base, the precision or T5's length changed"


def test_further_t5_lengths_are_encoded_with_one_t5_as_each_would_be_alone(base, tmp_path, encoded, monkeypatch):
    store, loaded = Store(tmp_path / "several"), []
    genuine = captions.load_text_encoder_in

    def load(form, base, encoder, *rest):
        loaded.append(encoder)
        return genuine(form, base, encoder, *rest)

    monkeypatch.setattr(captions, "load_text_encoder_in", load)
    keys, report = encode(base, store, length=77, extra_t5_lengths=[16, 154])
    assert loaded == list(ENCODERS)
    assert Counter(encoded) == {(encoder, text): 3 if encoder == "t5" else 1 for encoder in ENCODERS for text in TEXTS}
    assert report.summary().startswith("captions: 4 texts x 3 encoders, T5 at 77, 16, 154 tokens, all new, ")
    assert [re.findall(r"\w+ takes \d+", line) for line in report.warnings] == [
        ["CLIP takes 77"], ["T5 takes 77"], ["T5 takes 16"], ["T5 takes 154"]
    ]  # fmt: skip
    for length in (16, 154):
        alone = Store(tmp_path / f"{length}")
        at_length, _ = encode(base, alone, length=length)
        assert at_length["clip_l"] == keys["clip_l"]
        for key in at_length["t5"].values():
            assert torch.equal(store.get(key)["hidden"], alone.get(key)["hidden"])
    everything = {key for of in (keys, at_length) for key in of["t5"].values()}
    assert len(everything) == 2 * len(TEXTS)
    encoded.clear()
    _, report = encode(base, Store(tmp_path / "several"), length=154, extra_t5_lengths=[16])
    assert (encoded, report.encoded) == ([], 0)
    _, report = encode(base, store, length=77, extra_t5_lengths=[16, 20])
    assert encoded == [("t5", text) for text in TEXTS]


def test_the_announced_bytes_count_every_t5_length(base, tmp_path):
    store = Store(tmp_path)
    keys, report = encode(base, store, length=154, extra_t5_lengths=[16])
    at_16 = captions.caption_keys(base, TEXTS, encoders=["t5"], dtype=torch.float32, max_sequence_length=16)
    assert report.nbytes == store.nbytes([key for of in (*keys.values(), *at_16.values()) for key in of.values()])


def test_another_dtype_encodes_anew_in_that_dtype(base, tmp_path):
    store = Store(tmp_path)
    before, _ = encode(base, store, texts=["a dog"])
    after, _ = encode(base, store, texts=["a dog"], dtype=torch.bfloat16)
    assert store.get(before["t5"]["a dog"])["hidden"].dtype == torch.float32
    assert all(store.get(after[encoder]["a dog"])["hidden"].dtype == torch.bfloat16 for encoder in ENCODERS)


def test_one_changed_caption_encodes_that_one_alone_and_says_so(base, tmp_path, encoded):
    records = [Record(tmp_path / f"{n}.png", f"dog number {n}", 1, 0) for n in range(4)]
    encode(base, Store(tmp_path / "s"), texts=[r.caption for r in records], records=records)
    encoded.clear()
    records[2] = Record(records[2].image, "a cat", 1, 0)
    _, report = encode(base, Store(tmp_path / "s"), texts=[r.caption for r in records], records=records)
    assert encoded == [(encoder, "a cat") for encoder in ENCODERS]
    assert report.summary() == "captions: 1 of 4 re-encoded: caption changed"
    records.append(Record(tmp_path / "4.png", "a bird", 1, 0))
    _, report = encode(base, Store(tmp_path / "s"), texts=[r.caption for r in records], records=records)
    assert report.summary() == "captions: 1 of 5 encoded: new"


def test_a_damaged_store_is_given_as_the_reason(base, tmp_path):
    encode(base, Store(tmp_path))
    for shard in tmp_path.glob("*.safetensors"):
        shard.write_bytes(shard.read_bytes()[:-1])
    _, report = encode(base, Store(tmp_path))
    assert report.summary() == "captions: 4 of 4 re-encoded: lost from the store"


def test_damaged_entries_are_encoded_again_and_named(base, tmp_path, encoded):
    keys, _ = encode(base, Store(tmp_path))
    expected = {
        key: {name: tensor.clone() for name, tensor in Store(tmp_path).get(key).items()}
        for of in keys.values()
        for key in of.values()
    }
    for shard in tmp_path.glob("*.safetensors"):
        content = shard.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        shard.write_bytes(content[:start] + bytes(len(content) - start))
    encoded.clear()
    _, report = encode(base, Store(tmp_path))
    assert len(encoded) == 4 * 3
    assert report.summary() == "captions: 4 of 4 re-encoded: lost from the store"
    assert report.warnings[0].startswith("4 damaged in the store, encoded again: '")
    for key, entry in expected.items():
        again = Store(tmp_path).get(key)
        assert all(torch.equal(again[name], tensor) for name, tensor in entry.items())


def test_without_t5_it_is_neither_loaded_nor_keyed(base, tmp_path, encoded):
    keys, report = encode(base, Store(tmp_path), encoders=("clip_l", "clip_g"))
    assert set(keys) == {"clip_l", "clip_g"} == {encoder for encoder, _ in encoded}
    assert "4 texts x 2 encoders" in report.summary()


def test_an_interrupted_pass_resumes_with_what_is_missing(base, tmp_path, encoded, monkeypatch):
    noted = TextEncoder.encode

    def interrupted(self, texts):
        if len(encoded) == 6:  # two of CLIP-G's four
            raise KeyboardInterrupt
        return noted(self, texts)

    monkeypatch.setattr(TextEncoder, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(base, Store(tmp_path))
    done = list(encoded)
    monkeypatch.setattr(TextEncoder, "encode", noted)
    keys, _ = encode(base, Store(tmp_path))
    assert len(encoded) == len(set(encoded)) == 12
    assert encoded[:6] == done
    assert not Store(tmp_path).missing(key for of in keys.values() for key in of.values())


def test_ranks_share_the_work_and_know_all_keys(base, tmp_path, encoded):
    texts = [f"caption {number}" for number in range(8)]
    first, second = Store(tmp_path), Store(tmp_path)
    keys, _ = encode(base, first, texts=texts, rank=0, world=2)
    by_first = list(encoded)
    assert encode(base, second, texts=texts, rank=1, world=2)[0] == keys
    assert 0 < len(by_first) < 24
    assert sorted(encoded) == sorted((encoder, text) for encoder in ENCODERS for text in texts)
    for store in (first, second):
        store.refresh()
        assert not store.missing(key for of in keys.values() for key in of.values())


def test_a_rank_that_looks_late_at_the_store_leaves_nothing_out(base, tmp_path):
    texts = [f"caption {number}" for number in range(8)]
    keys, _ = encode(base, Store(tmp_path), texts=texts, rank=0, world=2)
    encode(base, Store(tmp_path), texts=texts, rank=1, world=2)  # sees what rank 0 has written
    assert not Store(tmp_path).missing(key for of in keys.values() for key in of.values())


def test_captions_that_are_cut_off_are_reported(base, tmp_path):
    _, report = encode(base, Store(tmp_path), length=256)
    assert len(report.warnings) == 2
    assert "CLIP takes 77 tokens" in report.warnings[0]
    assert "ein Hund" in report.lines()[1]
    _, report = encode(base, Store(tmp_path / "short"), texts=TEXTS[:3])
    assert report.warnings == []


def test_the_announced_bytes_are_those_that_are_written(base, tmp_path):
    store = Store(tmp_path)
    keys, report = encode(base, store, length=154, dtype=torch.bfloat16)
    assert report.nbytes == store.nbytes(key for of in keys.values() for key in of.values())


def test_a_disk_without_room_is_one_line_with_the_numbers(base, tmp_path, monkeypatch):
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda path: SimpleNamespace(free=1200))
    with pytest.raises(RunError) as caught:
        encode(base, Store(tmp_path / "cache"))
    (line,) = caught.value.problems
    assert line.startswith(f"{tmp_path / 'cache'}: ")
    assert "0.1 MB" in line
    assert not (tmp_path / "cache").exists()


def test_t5_in_8_bits_has_entries_of_its_own_that_differ_little(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    store = Store(tmp_path)
    whole, _ = encode(base, store)
    eight, _ = encode(base, store, t5_form="int8")
    assert (eight["clip_l"], eight["clip_g"]) == (whole["clip_l"], whole["clip_g"])
    assert not set(eight["t5"].values()) & set(whole["t5"].values())
    store.refresh()
    for text in TEXTS:
        found, plain = (store.get(keys["t5"][text])["hidden"] for keys in (eight, whole))
        assert found.dtype is plain.dtype
        assert 0 < (found - plain).norm() < 0.05 * plain.norm()


def test_t5_goes_where_it_is_told_to_and_the_clips_do_not(base, tmp_path, monkeypatch):
    store = Store(tmp_path)
    apart, _ = encode(base, store, device="cpu", t5_device="cpu")
    assert apart == encode(base, store)[0], "where it was computed is no part of an entry"
    loaded = []
    genuine = captions.load_text_encoder_in
    monkeypatch.setattr(
        captions,
        "load_text_encoder_in",
        lambda form, base, encoder, dtype, device, length: (
            loaded.append((encoder, str(device))) or genuine(form, base, encoder, dtype, "cpu", length)
        ),
    )
    encode(base, Store(tmp_path / "other"), device="meta", t5_device="cpu")
    assert loaded == [("clip_l", "meta"), ("clip_g", "meta"), ("t5", "cpu")]
