"""Aspect buckets: shapes that fit, the nearest bucket, and where their rows lie."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import ASPECTS, nearest, row_ranges, shape_of
from data.schema import Bucket

aspects = st.floats(0.2, 5.0)
multiples = st.sampled_from([1, 2, 4, 8, 16, 32, 64])


def test_the_shapes_of_sdxl() -> None:
    """Podell et al. 2023, appendix I, at 1024 px in steps of 64."""
    assert shape_of(4 / 3, 1024, 64) == (896, 1152)
    assert shape_of(3 / 2, 1024, 64) == (832, 1216)
    assert shape_of(16 / 9, 1024, 64) == (768, 1344)
    assert shape_of(2.0, 1024, 64) == (704, 1408)
    assert shape_of(1 / 2, 1024, 64) == (1408, 704)


@settings(deadline=None)
@given(aspects, st.integers(1, 64), multiples)
def test_a_shape_fits_and_is_as_large_as_it_may_be(aspect: float, patches: int, multiple: int) -> None:
    height, width = shape_of(aspect, patches * multiple, multiple)
    assert height % multiple == width % multiple == 0
    assert min(height, width) >= multiple
    area = (patches * multiple) ** 2
    assert height * width <= area
    assert (height // multiple + 1) * (width // multiple + 1) > area / multiple**2  # one more of both would not fit


@settings(deadline=None)
@given(aspects, st.integers(1, 64), multiples)
def test_a_shape_turned_is_the_shape_of_the_aspect_turned(aspect: float, patches: int, multiple: int) -> None:
    assert shape_of(1 / aspect, patches * multiple, multiple) == shape_of(aspect, patches * multiple, multiple)[::-1]


@settings(deadline=None)
@given(st.integers(1, 256), multiples)
def test_a_square_stays_one(patches: int, multiple: int) -> None:
    assert shape_of(1.0, patches * multiple, multiple) == (patches * multiple, patches * multiple)


@settings(deadline=None)
@given(st.sampled_from(sorted(ASPECTS)), st.sampled_from([16, 32, 64]), multiples)
def test_at_many_patches_aspect_and_area_are_near(name: str, patches: int, multiple: int) -> None:
    height, width = shape_of(ASPECTS[name], patches * multiple, multiple)
    assert width / height == pytest.approx(ASPECTS[name], rel=1.6 / patches)
    assert height * width == pytest.approx((patches * multiple) ** 2, rel=2 / patches)


def test_a_strip_is_one_multiple_thick() -> None:
    assert shape_of(40.0, 64, 16) == (16, 256)
    assert shape_of(1 / 40, 64, 16) == (256, 16)


@settings(deadline=None)
@given(st.integers(1, 9000), st.integers(1, 9000))
def test_nearest_loses_least_of_the_image(width: int, height: int) -> None:
    def kept(aspect: float) -> float:
        """Share of the image in its largest part of this aspect."""
        return min(width, height * aspect) * min(height, width / aspect) / (width * height)

    chosen = nearest(width, height)
    assert kept(ASPECTS[chosen]) == pytest.approx(max(kept(aspect) for aspect in ASPECTS.values()))
    turned = nearest(height, width)
    assert ASPECTS[turned] * ASPECTS[chosen] == pytest.approx(1.0) or math.isclose(
        kept(1 / ASPECTS[turned]), kept(ASPECTS[chosen])
    )  # a tie may fall either way


def test_row_ranges_follow_the_shards() -> None:
    buckets = [
        Bucket(name="1:1", aspect=1.0, first_shard=0, num_shards=2),
        Bucket(name="2:1", aspect=2.0, first_shard=2, num_shards=1),
        Bucket(name="1:2", aspect=0.5, first_shard=3, num_shards=2),
    ]
    assert row_ranges([5, 2, 9, 1, 0], buckets) == {"1:1": (0, 7), "2:1": (7, 16), "1:2": (16, 17)}
