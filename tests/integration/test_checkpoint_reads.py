"""Bytes that a restore reads from S3, counted outside the process: at most 1.1 times the checkpoint's size."""

import pytest

from ops.bench.checkpoint_reads import OURS, Reads, layouts, run, table


@pytest.mark.slow
def test_a_restore_reads_little_more_than_the_checkpoint() -> None:
    found = run(192, 2, [(2, 2), (2, 1)], readers=(OURS,))
    for (reads,) in found.values():
        assert reads.stored > 10 << 20
        assert 0.99 <= reads.ratio <= 1.1, "headers of shards are not read"


def test_the_table_has_both_readers_side_by_side() -> None:
    pair = tuple(Reads(reader, 2, 1, 1000, read, 7) for reader, read in ((OURS, 1010), ("FsspecReader", 2500)))
    lines = table({(2, 1): pair}).splitlines()
    assert lines[0].split()[-2:] == [OURS, "FsspecReader"]
    assert "1.010x" in lines[1]
    assert "2.500x" in lines[1]
    assert layouts(["2:1"]) == [(2, 1)]
