import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd3tune.data.buckets import bucket_table, nearest_bucket, size_name

SDXL = "1024x1024 1152x896 1216x832 1344x768 1472x704 896x1152 832x1216 768x1344 704x1472"
resolutions = st.integers(1, 256).map(lambda n: 16 * n)


def test_at_1024_the_table_is_the_known_one():
    assert sorted(size_name(size) for size in bucket_table(1024)) == sorted(SDXL.split())


def test_at_512_every_side_is_half():
    assert bucket_table(512) == [(height // 2, width // 2) for height, width in bucket_table(1024)]


@given(resolutions)
def test_a_bucket_can_be_trained_on_and_costs_no_more_than_the_square(resolution):
    table = bucket_table(resolution)
    assert table[0] == (resolution, resolution)
    assert len(set(table)) == len(table)
    assert {(width, height) for height, width in table} == set(table)
    for height, width in table:
        assert height % 16 == width % 16 == 0
        assert 0 < height * width <= resolution**2
        assert resolution < 128 or height * width > 0.85 * resolution**2


@given(resolutions, st.integers(16, 4096))
def test_nothing_lies_beyond_the_position_grid(resolution, largest):
    kept = bucket_table(resolution, max(largest, resolution))
    assert kept == [size for size in bucket_table(resolution) if max(size) <= max(largest, resolution)]
    assert (resolution, resolution) in kept


@pytest.mark.parametrize(
    ("width", "height", "bucket"),
    [
        (3000, 3000, "1024x1024"),
        (4000, 3000, "1152x896"),
        (3000, 4000, "896x1152"),
        (6000, 4000, "1216x832"),
        (1920, 1080, "1344x768"),
        (1080, 1920, "768x1344"),
        (4000, 1000, "1472x704"),
        (10, 9, "1024x1024"),
    ],
)
def test_usual_pictures_go_to_the_bucket_of_their_shape(width, height, bucket):
    assert size_name(nearest_bucket((height, width), bucket_table(1024))) == bucket


@given(st.integers(1, 5000), st.integers(1, 5000), resolutions)
def test_turning_an_image_turns_its_bucket_and_no_other_bucket_is_nearer(height, width, resolution):
    table = bucket_table(resolution)
    bucket = nearest_bucket((height, width), table)
    turned = nearest_bucket((width, height), table)
    distance = [abs(math.log(w / h * height / width)) for h, w in table]
    assert abs(math.log(bucket[1] / bucket[0] * height / width)) == pytest.approx(min(distance), abs=1e-9)
    assert turned == bucket[::-1] or sorted(distance)[1] - min(distance) < 1e-9
