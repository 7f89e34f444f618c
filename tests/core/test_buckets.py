"""Static shapes: every row has a bucket, and the passes take each row once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.accelerators.buckets import Bucket, check_buckets, choose_bucket, default_buckets, parse_buckets, plan_passes
from core.errors import ConfigError


def test_the_smallest_bucket_that_fits_is_taken() -> None:
    buckets = parse_buckets("1x64,1x256,8x64,8x256")
    assert choose_bucket(buckets, 1, 64) == Bucket(1, 64)
    assert choose_bucket(buckets, 1, 65) == Bucket(1, 256)
    assert choose_bucket(buckets, 2, 64) == Bucket(8, 64)
    assert choose_bucket(buckets, 8, 65) == Bucket(8, 256)
    for rows, length in ((9, 64), (1, 257)):
        with pytest.raises(ValueError, match=f"no bucket holds {rows} rows of {length}"):
            choose_bucket(buckets, rows, length)


def test_equal_cost_takes_the_shorter() -> None:
    assert choose_bucket(parse_buckets("1x512,8x64"), 1, 60) == Bucket(8, 64)


@given(st.integers(1, 4096))
def test_the_default_buckets_end_at_the_longest_row(longest: int) -> None:
    buckets = default_buckets(longest)
    check_buckets(buckets, longest)
    assert max(bucket.length for bucket in buckets) == longest
    assert choose_bucket(buckets, 8, longest) == Bucket(8, longest)


@given(st.lists(st.integers(1, 300), max_size=40), st.sampled_from(["1x300", "1x64,8x64,8x300", "4x128,2x300,16x10"]))
def test_every_row_is_in_one_pass_that_holds_it(lengths: list[int], names: str) -> None:
    buckets = parse_buckets(names)
    passes = plan_passes(buckets, lengths)
    assert sorted(index for _, indices in passes for index in indices) == list(range(len(lengths)))
    for bucket, indices in passes:
        assert bucket in buckets
        assert 0 < len(indices) <= bucket.rows
        assert max(lengths[index] for index in indices) <= bucket.length


@pytest.mark.parametrize(
    ("lengths", "passes"),
    [
        ([200] * 2, ["1x256"] * 2),  # 512 positions, and 2048 as one pass of eight rows
        ([200] * 8, ["8x256"]),
        ([200] * 10, ["1x256", "1x256", "8x256"]),
        ([200] + [60] * 8, ["1x256", "8x64"]),
        ([60] * 7, ["1x64"] * 7),
    ],
)
def test_a_pass_of_many_rows_is_for_many_rows(lengths: list[int], passes: list[str]) -> None:
    buckets = parse_buckets("1x64,1x256,8x64,8x256")
    assert [str(bucket) for bucket, _ in plan_passes(buckets, lengths)] == passes


def test_a_row_that_no_bucket_holds_has_no_pass() -> None:
    with pytest.raises(ValueError, match="no bucket holds a row of 65"):
        plan_passes(parse_buckets("1x64,8x64"), [60, 65])


@pytest.mark.parametrize(
    ("text", "reason"), [("8", "ROWSxPOSITIONS"), ("0x64", "0x64"), ("8x64,", "''"), ("8x-1", "8x-1"), ("", "''")]
)
def test_what_is_no_bucket_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_buckets(text)


def test_a_table_without_room_or_with_a_shape_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="longest row has 300 positions, and the longest bucket 256"):
        check_buckets(parse_buckets("1x64,8x256"), 300)
    with pytest.raises(ConfigError, match="twice"):
        check_buckets(parse_buckets("8x256,8x256"), 200)
