"""How a build cuts shards, joins small buckets, counts, and tells: pure functions, against plain computations."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.buckets import parse_aspects
from data.card import Card, grid
from data.mdsbuild.plan import Plan, _Row, _write, join_small
from data.mdsbuild.shards import ITEMS, shard_items
from data.mdsbuild.sidecars import Sidecar, parse_captions_option
from data.provenance import Record, _without_secrets, rejected
from data.schema import DatasetInfo
from data.stats import SIDES, WORDS, Statistics, bin_names, median, parse_statistics
from trainer.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    windows=st.lists(st.lists(st.integers(1, 4000), max_size=60), min_size=1, max_size=12),
    shard_bytes=st.integers(4000, 30000),
)
def test_shards_partition_a_bucket_in_order(
    windows: list[list[int]], shard_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    flat = [size for window in windows for size in window]
    if not flat:
        return
    folder = tmp_path_factory.mktemp("plan")
    row = _Row(0, sum(flat), -(-sum(flat) // shard_bytes), folder / "labels")
    for number, window in enumerate(windows):
        row.append(number, 0, np.array(window, dtype=np.int64))
    work = type("Work", (), {"scratch": folder})()
    files = _write(work, [row], {"any": 1}, labelled=False)
    with np.load(files["shards"]) as arrays:
        plan = Plan(arrays["pieces"], arrays["ends"], {})
    seen = []
    for shard in range(plan.num_shards):
        places = [(p.window, i) for p in plan.of_shard(shard) for i in range(p.start, p.stop)]
        num_bytes = sum(windows[window][i] for window, i in places)
        assert places
        assert num_bytes <= shard_bytes + 4000
        seen += places
    assert seen == [(w, i) for w, window in enumerate(windows) for i in range(len(window))]
    assert plan.num_shards <= -(-sum(flat) // shard_bytes)


def test_shards_are_of_about_equal_size_and_leave_no_remainder() -> None:
    sizes = np.random.default_rng(0).integers(40_000, 130_000, 9000)
    total = int(sizes.sum())
    limit = 64 << 20
    row = _Row(0, total, -(-total // limit), Path("unused"))
    row.append(0, 0, sizes)
    ends = [row.pieces[i * 4 + 3] for i in range(len(row.shards))]
    of_shard = [int(part.sum()) for part in np.split(sizes, ends[:-1])]
    assert len(of_shard) == -(-total // limit)
    assert max(of_shard) - min(of_shard) < 3 * 130_000


def test_small_buckets_join_the_nearest_that_has_enough() -> None:
    aspects = {"1:2": 0.5, "2:3": 2 / 3, "1:1": 1.0, "3:2": 1.5, "2:1": 2.0}
    assert join_small(aspects, [5, 3, 500, 400, 20], 100) == {0: 2, 1: 2, 2: 2, 3: 3, 4: 3}
    assert join_small(aspects, [5, 3, 9, 4, 2], 100) == dict.fromkeys(range(5), 2)  # none has enough: the largest
    assert join_small(aspects, [5, 3, 500, 400, 20], 1) == {i: i for i in range(5)}
    # A bucket that would be a ten-thousandth of the whole joins, however few are asked for.
    assert join_small(aspects, [0, 50, 10**6, 10**6, 0], 1)[1] == 2


def test_items_are_few_enough_to_list() -> None:
    def items(num_shards: int) -> list[tuple[int, int]]:
        plan = Plan(np.empty((0, 4), dtype=np.int64), np.arange(num_shards), {})
        return [(item["first"], item["stop"]) for item in shard_items(plan)]

    for count in (1, 255, 5_000, 400_000):
        found = items(count)
        assert [n for first, stop in found for n in range(first, stop)] == list(range(count))
        assert len(found) <= ITEMS
    assert len(items(200)) == 200  # few shards: one each, so that all workers have some


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("none", []),
        ("1:1, 2:3", ["2:3", "1:1"]),
        ("default", ["1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1"]),
    ],
)
def test_buckets_as_one_writes_them(text: str, names: list[str]) -> None:
    assert list(parse_aspects(text, option="--buckets")) == names


@pytest.mark.parametrize("text", ["", "4", "1:0", "a:b", "1:1,2:2", "1:200", "4:3,"])
def test_buckets_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--buckets: "):
        parse_aspects(text, option="--buckets")


def test_captions_with_and_without_a_kind() -> None:
    assert parse_captions_option("s3://b/c?x=1") == Sidecar("s3://b/c?x=1")
    assert parse_captions_option("detailed=out/c/") == Sidecar("out/c", "detailed")
    with pytest.raises(UserError, match="no word"):
        parse_captions_option("a b=out/c")


# ----------------------------------------------------------------------------------------------------------- statistics


def _add(stats: Statistics, i: int) -> None:
    stats.add(
        key=f"k{i}", width=50 + 37 * i, height=700, num_bytes=1000 * i, kind="jpeg",
        captions={"original": ["w " * (i % 40)], "short": ["x"] * (i % 3)}, licence=f"L{i % 4}" if i % 5 else None,
        class_name=f"c{i % 7}" if i % 2 else None,
    )  # fmt: skip


def test_parts_counted_apart_and_joined_are_the_whole() -> None:
    whole, parts = Statistics(), [Statistics() for _ in range(3)]
    for i in range(200):
        _add(whole, i)
        _add(parts[i * i % 3], i)
    joined = Statistics()
    for part in reversed(parts):
        joined.join(parse_statistics(part.model_dump_json(), source="x"))
    assert joined.model_dump() == whole.model_dump()
    assert whole.captions["short"].samples == sum(i % 3 > 0 for i in range(200))
    assert whole.captions["short"].texts == sum(i % 3 for i in range(200))
    narrow = sum(50 + 37 * i < 384 for i in range(200))
    assert sum(n for n, edge in zip(whole.short_sides, SIDES, strict=True) if edge < 384) == narrow
    assert len(whole.captions["original"].examples) == 3


def test_names_beyond_the_limit_are_counted_together() -> None:
    stats = Statistics()
    for i in range(2500):
        stats.add(key="k", width=1, height=1, num_bytes=1, kind="jpeg", captions={}, licence=f"L{i}")
    assert len(stats.licences) == 2001
    assert stats.licences["(others)"] == 500
    assert sum(stats.licences.values()) == 2500


def test_bins_have_names() -> None:
    assert bin_names((0, 1, 2, 4)) == ["0", "1", "2-3", "4+"]
    assert median(WORDS, [0] * 4 + [3, 0, 1, 0, 0, 0]) == "8-15"
    assert median(WORDS, [0] * 10) == "-"


@pytest.mark.parametrize("damage", [{"short_sides": [1]}, {"samples": -1}, {"evil": 1}])
def test_statistics_from_storage_are_checked(damage: dict[str, object]) -> None:
    tree = Statistics().model_dump() | damage
    with pytest.raises(UserError, match=r"stats\.json"):
        parse_statistics(json.dumps(tree), source="stats.json")


# --------------------------------------------------------------------------------------------------- provenance, card


def test_nothing_secret_is_told() -> None:
    told = _without_secrets({"url": "ftp://me:pw@host/x", "api_key": "hush", "list": ["s3://a:b@c/d"], "keys": 3})
    assert told == {"url": "ftp://host/x", "api_key": "(hidden)", "list": ["s3://c/d"], "keys": 3}


def test_what_all_stages_have_left_out() -> None:
    records = [
        Record("ingest", {}, {"ingest": {"read": 9, "rejected/too_small": 2}, "drops": {"duplicate/exact": 1}}),
        Record("build", {}, {"samples": {"rejected/too_small": 1, "kept": 4}}),
    ]
    assert rejected(records) == {"duplicate_exact": 1, "too_small": 3}


def test_a_card_quotes_and_never_marks_up() -> None:
    stats = Statistics()
    evil = "<script>alert(1)</script> | [x](javascript:y) ![i](http://z) `c`"
    stats.add(key=evil, width=64, height=64, num_bytes=9, kind="jpeg", captions={"original": [evil]}, licence=evil)
    info = DatasetInfo(name=evil, num_samples=1, index_digest="0", notice=evil, licences={evil: 1})
    files = Card(info, stats, 1, 100, records=[Record(evil, {"a": evil}, {evil: {evil: 1}})]).files()
    assert b"<script>" not in files["card.html"].replace(b"&lt;", b"")
    assert b"<script>" not in files["README.md"].replace(b"\\<", b"")
    assert b"](" not in files["README.md"].replace(b"\\](", b"").replace(b"![Some of its images](", b"")
    rows = [line for line in files["README.md"].decode().splitlines() if line.startswith("|")]
    assert all(len([c for i, c in enumerate(row) if c == "|" and row[i - 1] != "\\"]) in (3, 4) for row in rows)
    assert "samples.png" not in files


def test_a_grid_leaves_out_what_cannot_be_decoded() -> None:
    from tests.unit.data.conftest import encoded, picture

    good = [encoded(picture(i)) for i in range(9)]
    assert grid([b"\xff\xd8\xff cut"]) is None
    made = grid([*good, b"\xff\xd8\xff cut"])
    assert made is not None
    from data.images import read_image

    assert read_image(made).shape == (192, 768, 3)
