"""Runs that are stopped, killed, resumed on other numbers of ranks, and whose shards go bad on the way: what
`ops/bench/data_sequences.py` measures, some of it here."""

from pathlib import Path

import pytest

from ops.bench.data_sequences import SAVE_EVERY, Result, in_words, sequence, write_datasets


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_datasets(tmp_path_factory.mktemp("sequences") / "whole")


def check(result: Result) -> None:
    assert result.exact, in_words(result)
    assert result.batches == 48
    assert result.again <= result.kills * SAVE_EVERY or result.damages


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 2])
def test_no_sample_is_lost_or_repeated(whole: Path, tmp_path: Path, seed: int) -> None:
    result = sequence(tmp_path / "x", whole, seed)
    check(result)
    assert result.left_out == 0
    assert result.resizes > 0


def test_nor_where_shards_go_bad_now_and_then(whole: Path, tmp_path: Path) -> None:
    result = sequence(tmp_path / "x", whole, 15, damage=True)
    check(result)
    # how many of them a run meets before they are mended is chance; tests/distributed/test_bad_shards.py leaves nothing to it
    assert result.damages > 0


@pytest.mark.long
@pytest.mark.parametrize("seed", range(20))
def test_twenty_sequences(whole: Path, tmp_path: Path, seed: int) -> None:
    check(sequence(tmp_path / "x", whole, seed, damage=seed >= 15, own=True))
