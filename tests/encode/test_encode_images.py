import json
import os
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file, save_file

from sd3tune.config.sections.data import DataConfig
from sd3tune.data.crops import crops
from sd3tune.data.images import file_digest, upright_size
from sd3tune.data.records import Record, load_records
from sd3tune.data.store import Store, key
from sd3tune.encode import images
from sd3tune.encode.images import encode_images
from sd3tune.errors import DataError, ModelError
from sd3tune.model.base.resolve import resolve_base
from sd3tune.model.load.components import load_pipeline

PHOTOS = Path(__file__).resolve().parents[3] / "shared" / "data" / "dreambooth"


def save_noise(path, height, width, seed):
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / "dog"
    folder.mkdir()
    for number in range(5):
        save_noise(folder / f"{number}.png", 64 + 8 * number, 96, number)
    return [Record(folder / f"{number}.png", f"dog {number}", 1, 0) for number in range(5)]


def encode(base, records, store, resolution=64, dtype=torch.float32, **more):
    """Keys per record, and the report; square crops unless `buckets` are given."""
    more.setdefault("buckets", [(resolution, resolution)])
    encoded, report = encode_images(base, records, store, dtype=dtype, **more)
    return [list(image.keys) for image in encoded], report


@pytest.fixture
def encoded(monkeypatch):
    """The pixels of every image that really went through the VAE."""
    calls = []
    genuine = images.encode_moments

    def noted(vae, pixels):
        calls.append(pixels)
        return genuine(vae, pixels)

    monkeypatch.setattr(images, "encode_moments", noted)
    return calls


def moments_by_diffusers(pipeline, image):
    with torch.no_grad():
        posterior = pipeline.vae.encode(pipeline.image_processor.preprocess(image)).latent_dist
    return posterior.mean[0], posterior.std[0]


@pytest.fixture(scope="module")
def pipeline(base):
    return load_pipeline(base, torch.float32)


def test_stored_moments_equal_the_vaes_own_on_the_pipelines_preprocessing(base, pipeline, records, tmp_path):
    store = Store(tmp_path / "s")
    keys, _ = encode(base, records, store, flip=True)
    for record, (plain, mirrored) in zip(records, keys, strict=True):
        image = Image.open(record.image)
        short = min(image.size)  # the first image is of the target's height already, the others are scaled
        scaled = image.resize(
            (round(image.width * 64 / short), round(image.height * 64 / short)), Image.Resampling.LANCZOS
        )
        left, top = (scaled.width - 64) // 2, (scaled.height - 64) // 2
        cut = scaled.crop((left, top, left + 64, top + 64))
        for name, expected in ((plain, cut), (mirrored, cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT))):
            mean, std = moments_by_diffusers(pipeline, expected)
            found = store.get(name)
            assert found["mean"].dtype == found["std"].dtype == torch.float32
            assert torch.equal(found["mean"], mean)
            assert torch.equal(found["std"], std)


def test_keys_follow_the_records_through_any_order(base, records, tmp_path):
    store = Store(tmp_path / "s")
    keys, _ = encode(base, records, store)
    shuffled = [records[index] for index in (3, 0, 4, 2, 1)]
    again, _ = encode(base, shuffled, store)
    assert again == [keys[index] for index in (3, 0, 4, 2, 1)]
    assert len({key for (key,) in keys}) == 5


def test_the_vae_is_freed_and_loaded_only_when_something_is_missing(base, records, tmp_path, monkeypatch):
    genuine, loaded = images.load_vae, []

    def watched(*args, **kwargs):
        vae = genuine(*args, **kwargs)
        loaded.append(weakref.ref(vae))
        return vae

    monkeypatch.setattr(images, "load_vae", watched)
    first, report = encode(base, records, Store(tmp_path / "s"))
    assert report.summary().startswith("images: 5, all new, ")
    assert [vae() for vae in loaded] == [None]
    again, report = encode(base, records, Store(tmp_path / "s"))
    assert again == first
    assert len(loaded) == 1
    assert report.summary() == "images: 5, all reused"


def test_renaming_and_touching_change_nothing(base, records, tmp_path, encoded):
    keys, _ = encode(base, records, Store(tmp_path / "s"))
    encoded.clear()
    os.utime(records[0].image, (0, 0))
    moved = tmp_path / "elsewhere.png"
    records[1].image.rename(moved)
    renamed = [records[0], Record(moved, "dog", 1, 0), *records[2:]]
    again, report = encode(base, renamed, Store(tmp_path / "s"))
    assert again == keys
    assert encoded == []
    assert report.reused == 5


def test_one_changed_byte_encodes_that_image_alone_and_says_so(base, records, tmp_path, encoded):
    keys, _ = encode(base, records, Store(tmp_path / "s"))
    encoded.clear()
    save_noise(records[3].image, 64, 64, seed=77)
    again, report = encode(base, records, Store(tmp_path / "s"))
    assert len(encoded) == 1
    assert [number for number in range(5) if keys[number] != again[number]] == [3]
    assert report.summary() == "images: 1 of 5 re-encoded: image changed"
    content = records[4].image.read_bytes()
    records[4].image.write_bytes(content + b"\0")  # after the image's end: the same pixels, other bytes
    assert encode(base, records, Store(tmp_path / "s"))[0][4] != again[4]


def test_a_new_image_and_another_resolution_are_told_apart(base, records, tmp_path):
    encode(base, records[:3], Store(tmp_path / "s"))
    _, report = encode(base, records, Store(tmp_path / "s"))
    assert report.summary() == "images: 2 of 5 encoded: new"
    _, report = encode(base, records, Store(tmp_path / "s"), resolution=32)
    assert report.summary() == "images: 5 of 5 re-encoded: the base, the precision, the resolution or the crops changed"


def test_more_variants_encode_only_what_is_new(base, records, tmp_path, encoded):
    few, _ = encode(base, records, Store(tmp_path / "s"), crop_variants=2)
    encoded.clear()
    many, _ = encode(base, records, Store(tmp_path / "s"), crop_variants=4)
    assert [keys[:2] for keys in many] == few
    assert len(encoded) == len({key for keys in many for key in keys} - {key for keys in few for key in keys})


def test_copies_of_an_image_are_encoded_once(base, records, tmp_path, encoded):
    copy = tmp_path / "copy.png"
    copy.write_bytes(records[0].image.read_bytes())
    keys, _ = encode(base, [*records, Record(copy, "copy", 1, 0)], Store(tmp_path / "s"))
    assert len(encoded) == 5
    assert keys[5] == keys[0]


def test_fp16_runs_the_vae_in_fp32(base, records, tmp_path, monkeypatch):
    genuine, dtypes = images.load_vae, []
    monkeypatch.setattr(images, "load_vae", lambda b, dtype, device: dtypes.append(dtype) or genuine(b, dtype, device))
    half, _ = encode(base, records, Store(tmp_path / "s"), dtype=torch.float16)
    assert dtypes == [torch.float32]
    assert encode(base, records, Store(tmp_path / "s"))[0] == half
    assert encode(base, records, Store(tmp_path / "s"), dtype=torch.bfloat16)[0] != half


def test_all_unreadable_files_are_named_before_a_model_is_loaded(base, records, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "load_vae", None)
    for record in records[1:3]:
        record.image.write_bytes(record.image.read_bytes()[:2000])  # the header is sound
    with pytest.raises(DataError) as caught:
        encode(base, records, Store(tmp_path / "s"))
    assert [line.split(":")[0] for line in caught.value.problems] == [str(r.image) for r in records[1:3]]


def test_an_image_that_changes_while_others_are_encoded_is_refused(base, records, tmp_path, monkeypatch):
    genuine = images.load_vae

    def meanwhile(*args):
        save_noise(records[4].image, 64, 64, seed=5)
        return genuine(*args)

    monkeypatch.setattr(images, "load_vae", meanwhile)
    with pytest.raises(DataError, match=r"4\.png: changed while images were being encoded"):
        encode(base, records, Store(tmp_path / "s"))


def test_an_interrupted_pass_resumes_with_what_is_missing(base, records, tmp_path, encoded, monkeypatch):
    noted = images.encode_moments

    def interrupted(vae, pixels):
        if len(encoded) == 3:
            raise KeyboardInterrupt
        return noted(vae, pixels)

    monkeypatch.setattr(images, "encode_moments", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode(base, records, Store(tmp_path / "s"))
    monkeypatch.setattr(images, "encode_moments", noted)
    keys, report = encode(base, records, Store(tmp_path / "s"))
    assert len(encoded) == 5
    assert report.summary() == "images: 2 of 5 encoded: new"
    assert not Store(tmp_path / "s").missing(key for of in keys for key in of)


def test_ranks_share_the_work_and_know_all_keys(base, records, tmp_path, encoded):
    for number in range(5, 10):
        save_noise(tmp_path / f"{number}.png", 64, 64, number)
        records.append(Record(tmp_path / f"{number}.png", "dog", 1, 0))
    stores = [Store(tmp_path / "s") for _ in range(2)]
    keys, _ = encode(base, records, stores[0], rank=0, world=2)
    assert 0 < len(encoded) < 10
    assert encode(base, records, stores[1], rank=1, world=2)[0] == keys
    assert len(encoded) == 10
    for store in stores:
        store.refresh()
        assert not store.missing(key for of in keys for key in of)


def test_each_image_is_cut_to_the_bucket_of_its_shape(base, pipeline, tmp_path):
    shapes = {"wide": (64, 130), "tall": (200, 120), "square": (90, 100)}
    for number, (name, (height, width)) in enumerate(shapes.items()):
        save_noise(tmp_path / f"{name}.png", height, width, number)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "wide.png").save(tmp_path / "turned.png", exif=exif)
    records = [Record(tmp_path / f"{name}.png", name, 1, 0) for name in (*shapes, "turned")]
    store = Store(tmp_path / "s")
    found, report = encode_images(
        base, records, store, buckets=[(64, 64), (48, 80), (80, 48)], crop_variants=2, flip=True, dtype=torch.float32
    )
    assert [image.size for image in found] == [(48, 80), (80, 48), (64, 64), (80, 48)]
    for image in found:
        assert len(image.keys) == 4
        assert {store.get(key)["mean"].shape[1:] for key in image.keys} == {(image.size[0] // 8, image.size[1] // 8)}
    assert report.nbytes == store.nbytes(key for image in found for key in image.keys)
    scaled = Image.open(records[0].image).resize((98, 48), Image.Resampling.LANCZOS)
    mean, _ = moments_by_diffusers(pipeline, scaled.crop((9, 0, 89, 48)))
    assert torch.equal(store.get(found[0].keys[0])["mean"], mean)


def test_a_square_image_has_the_same_entry_with_and_without_buckets(base, tmp_path, encoded):
    save_noise(tmp_path / "a.png", 96, 90, 0)
    records = [Record(tmp_path / "a.png", "a dog", 1, 0)]
    alone, _ = encode(base, records, Store(tmp_path / "s"))
    among, _ = encode(base, records, Store(tmp_path / "s"), buckets=[(48, 80), (64, 64), (80, 48)])
    assert among == alone
    assert len(encoded) == 1


def test_small_images_are_reported_every_time(base, records, tmp_path):
    for _ in range(2):
        _, report = encode(base, records, Store(tmp_path / "s"), resolution=80)
        (warning,) = report.warnings
        assert warning.startswith("2 images are enlarged to fill the crop, ")
        assert "0.png (80x80), 1.png (80x80)" in warning
    assert encode(base, records, Store(tmp_path / "s"), resolution=64)[1].warnings == []


def test_the_announced_bytes_are_those_that_are_written(base, records, tmp_path):
    store = Store(tmp_path / "s")
    keys, report = encode(base, records, store, crop_variants=3, flip=True)
    assert report.nbytes == store.nbytes(key for of in keys for key in of)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the real photos are not here")
def test_real_photos(base, pipeline, tmp_path):
    data = DataConfig(sources=[{"kind": "folder", "path": str(PHOTOS / "dog"), "caption": "a dog"}], resolution=128)
    records = load_records(data)
    store = Store(tmp_path / "s")
    keys, report = encode(base, records, store, resolution=128, crop_variants=2, flip=True)
    assert report.encoded == len(records) == 5
    assert all(store.get(key)["mean"].isfinite().all() for of in keys for key in of)


def in_p3(path):
    """The picture of a file once more, with a profile whose red and green are not sRGB's."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    swapped = bytearray(srgb)
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    Image.open(path).save(path, icc_profile=bytes(swapped))


def without_readings(folder):
    """The manifest as versions wrote it that ignored colour profiles."""
    content = json.loads((folder / "manifest.json").read_text())
    del content["readings"]
    (folder / "manifest.json").write_text(json.dumps(content))


def test_only_what_a_colour_profile_changes_gets_another_key(base, records, tmp_path):
    in_p3(records[1].image)
    digests = [file_digest(record.image) for record in records]
    found, _ = encode_images(base, records, Store(tmp_path / "s"), buckets=[(64, 64)], dtype=torch.float32)
    plain = [
        key(
            "image",
            image=digest,
            vae=base.fingerprint("vae"),
            dtype="torch.float32",
            size=(64, 64),
            box=crops(upright_size(record.image), (64, 64), 1, False, digest)[0].box,
            flip=False,
            preprocessing=1,
        )
        for record, digest in zip(records, digests, strict=True)
    ]
    assert [image.earlier_keys for image in found] == [(one,) for one in plain]
    assert [image.keys == image.earlier_keys for image in found] == [True, False, True, True, True]


def test_a_manifest_that_knows_no_profiles_is_not_believed(base, records, tmp_path, encoded):
    in_p3(records[1].image)
    first, _ = encode(base, records, Store(tmp_path / "s"))
    without_readings(tmp_path / "s")
    encoded.clear()
    again, report = encode(base, records, Store(tmp_path / "s"))
    assert (again, encoded) == (first, [])
    assert report.summary() == "images: 5, all reused"
    assert json.loads((tmp_path / "s" / "manifest.json").read_text())["readings"][file_digest(records[1].image)] == [
        "sRGB",
        False,
        "",
    ]


def test_known_images_are_not_decoded_again(base, records, tmp_path, monkeypatch):
    encode(base, records, Store(tmp_path / "s"))
    monkeypatch.setattr("sd3tune.encode.inspect.read_picture", None)
    assert encode(base, records, Store(tmp_path / "s"))[1].reused == 5


def test_transparency_and_broken_profiles_are_reported_every_time(base, records, tmp_path):
    Image.new("RGBA", (64, 64), (9, 9, 9, 100)).save(records[0].image)
    Image.open(records[2].image).save(records[2].image, icc_profile=b"not a profile")
    for _ in range(2):
        _, report = encode(base, records, Store(tmp_path / "s"), resolution=64)
        assert report.warnings == [
            f"1 image has transparent parts, which are laid on white: {records[0].image.name}; "
            "masks: alpha uses them as masks",
            f"{records[2].image}: its colour profile is damaged; its colours are taken as sRGB",
        ]


def test_latents_that_are_not_finite_are_refused_by_name_and_never_stored(base, records, tmp_path) -> None:
    """The weights are finite, as an overflow in 16 bits has it."""
    broken = Path(shutil.copytree(base.path, tmp_path / "broken"))
    file = broken / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["encoder.conv_out.weight"].fill_(3e38)
    save_file(tensors, file, metadata={"format": "pt"})
    store = Store(tmp_path / "s")
    with pytest.raises(ModelError, match=r"0\.png: the VAE turns it into NaN or infinity; try model\.dtype=fp32"):
        encode(resolve_base(str(broken)), records[:1], store)
    assert len(Store(tmp_path / "s")) == 0
