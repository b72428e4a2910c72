"""Which samples of hundreds of millions are copies of an earlier one, in bounded memory.

Exact copies have the same bytes. Near ones differ in at most `distance` of the 64 bits of their perceptual hash. Of copies the
first stays. Rows are spread over files by what must be equal for two to be copies, so that all that could be are in one file; a
file is sorted in memory. For a distance above 0 the hash is cut into blocks: two that differ in at most D bits agree in all but
D of the blocks, so it is enough to compare those that agree in some choice of them (Manku, Jain and Das Sarma, WWW 2007).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

EXACT, NEAR = 1, 2
"""Why a sample is dropped; 0: it stays."""
HASHES = np.dtype([("content", "<u8", (2,)), ("phash", "<u8")])
"""Of a sample: xxh3_128 of its bytes; perceptual hash, 0: none."""
MAX_DISTANCE = 8

PARTITION_ROWS = 4 << 20
"""Of a file that is sorted at once: half a GiB of memory."""
MAX_PAIRS = 50_000_000
"""Near pairs that are held in memory, 16 bytes each."""
_RECORD = np.dtype([("group", "<u8"), ("content", "<u8", (2,)), ("row", "<u8")])
_HASHED = np.dtype([("phash", "<u8"), ("row", "<u8")])
_CHUNK_ROWS = 1 << 20

Tick = Callable[[], None]


def find_duplicates(
    chunks: Iterable[NDArray[Any]], num_rows: int, distance: int | None, scratch: Path, tick: Tick = lambda: None
) -> NDArray[np.uint8]:
    """Why each row is dropped: (num_rows,) of 0, `EXACT` or `NEAR`.

    Args:
        chunks: the rows in order, as arrays of `HASHES`.
        distance: bits of the perceptual hash in which near copies may differ; None: only exact copies are looked for.
        scratch: folder on a disk with 48 bytes a row.
        tick: called often; may raise to stop.

    Raises:
        UserError: more near pairs than memory is meant for.
    """
    reasons = np.zeros(num_rows, np.uint8)
    hashed = open(scratch / "hashed", "wb") if distance else None  # noqa: SIM115
    with _Partitions(scratch, "group", _RECORD, num_rows) as partitions:
        row = 0
        for chunk in _gathered(chunks):
            records = np.empty(len(chunk), _RECORD)
            records["content"] = chunk["content"]
            records["row"] = np.arange(row, row + len(chunk))
            # A hash follows from the bytes, so exact copies of a near copy are in the same group.
            has_hash = (chunk["phash"] != 0) & (distance is not None)
            records["group"] = np.where(has_hash, chunk["phash"], chunk["content"][:, 0])
            partitions.add(records, records["group"])
            row += len(chunk)
            tick()
        assert row == num_rows
        for records in partitions:
            stay = _mark_equal(records, reasons)
            if hashed is not None:
                _hashed(stay).tofile(hashed)
            tick()
    if hashed is not None:
        assert distance
        hashed.close()
        _mark_near(scratch, distance, reasons, tick)
        (scratch / "hashed").unlink()
    return reasons


def _gathered(chunks: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
    """Small chunks joined, so that each is worth a sort."""
    waiting: list[NDArray[Any]] = []
    for chunk in chunks:
        waiting.append(chunk)
        if sum(map(len, waiting)) >= _CHUNK_ROWS // 8:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def _mark_equal(records: NDArray[Any], reasons: NDArray[np.uint8]) -> NDArray[Any]:
    """Mark copies that are equal, in bytes or in hash; returns the records that stay."""
    if not len(records):
        return records
    order = np.lexsort((records["row"], records["content"][:, 1], records["content"][:, 0], records["group"]))
    records = records[order]
    same_group = records["group"][1:] == records["group"][:-1]
    same = same_group & (records["content"][1:] == records["content"][:-1]).all(axis=1)
    exact = np.concatenate([[False], same])
    reasons[records["row"][exact]] = EXACT
    records = records[~exact]
    starts = np.flatnonzero(np.concatenate([[True], records["group"][1:] != records["group"][:-1]]))
    sizes = np.diff(np.append(starts, len(records)))
    first = np.repeat(np.minimum.reduceat(records["row"], starts), sizes)
    near = _has_hash(records) & (records["row"] != first)
    reasons[records["row"][near]] = NEAR
    return records[~near]


def _has_hash(records: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray(records["group"] != records["content"][:, 0])


def _hashed(records: NDArray[Any]) -> NDArray[Any]:
    records = records[_has_hash(records)]
    hashed = np.empty(len(records), _HASHED)
    hashed["phash"], hashed["row"] = records["group"], records["row"]
    return hashed


# ----------------------------------------------------------------------------------------------------- within a distance


def _mark_near(scratch: Path, distance: int, reasons: NDArray[np.uint8], tick: Tick) -> None:
    """Drop each row that is near an earlier one that stays."""
    num_rows = (scratch / "hashed").stat().st_size // _HASHED.itemsize
    pairs: list[NDArray[np.uint64]] = []
    num_pairs = 0
    for mask in _masks(distance, num_rows):
        with _Partitions(scratch, "near", _HASHED, num_rows) as partitions:
            for chunk in _chunks_of(scratch / "hashed"):
                partitions.add(chunk, chunk["phash"] & mask)
                tick()
            for records in partitions:
                for found in _near_pairs(records, mask, distance):
                    pairs.append(found)
                    num_pairs += len(found)
                    if num_pairs > MAX_PAIRS:
                        raise UserError(
                            f"--phash-distance {distance}: more than {MAX_PAIRS} pairs of images are that near; choose a "
                            "smaller distance"
                        )
                    tick()
    if not pairs:
        return
    earlier_later = np.concatenate(pairs)
    earlier_later = earlier_later[np.argsort(earlier_later[:, 1], kind="stable")]
    for start in range(0, len(earlier_later), _CHUNK_ROWS):
        for earlier, later in earlier_later[start : start + _CHUNK_ROWS].tolist():
            if not reasons[earlier]:
                reasons[later] = NEAR
        tick()


def _masks(distance: int, num_rows: int) -> list[np.uint64]:
    """Bits of which two hashes within the distance agree in all of at least one mask."""

    def cost(blocks: int) -> float:
        bits = 64 * (blocks - distance) // blocks
        return math.comb(blocks, distance) * (1 + num_rows / 2.0**bits)

    blocks = min(range(distance + 1, 17), key=cost)
    edges = [64 * i // blocks for i in range(blocks + 1)]
    parts = [((1 << (end - begin)) - 1) << begin for begin, end in pairwise(edges)]
    return [np.uint64(sum(chosen)) for chosen in combinations(parts, blocks - distance)]


def _near_pairs(records: NDArray[Any], mask: np.uint64, distance: int) -> Iterator[NDArray[np.uint64]]:
    """(earlier row, later row) of those that agree in the mask and differ in few of the other bits."""
    masked = records["phash"] & mask
    order = np.argsort(masked, kind="stable")
    masked, phash, row = masked[order], records["phash"][order], records["row"][order]
    begin = np.arange(len(masked))
    step = 1
    while len(begin):
        begin = begin[begin + step < len(masked)]
        # In sorted order a run has ended for good when it has ended.
        begin = begin[masked[begin] == masked[begin + step]]
        near = begin[np.bitwise_count(phash[begin] ^ phash[begin + step]) <= distance]
        if len(near):
            both = np.stack([row[near], row[near + step]], axis=1)
            yield np.sort(both, axis=1)
        else:
            yield np.empty((0, 2), np.uint64)
        step += 1


# ------------------------------------------------------------------------------------------------------------- on disk


class _Partitions:
    """Records spread over files by a key: equal keys are in one file."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype[Any], num_rows: int) -> None:
        self._dtype = dtype
        self._paths = [folder / f"{stem}-{i:05d}" for i in range(max(1, -(-num_rows // PARTITION_ROWS)))]
        self._files = [open(path, "wb", buffering=1 << 18) for path in self._paths]  # noqa: SIM115

    def __enter__(self) -> "_Partitions":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()
        for path in self._paths:
            path.unlink(missing_ok=True)

    def add(self, records: NDArray[Any], keys: NDArray[np.uint64]) -> None:
        where = _mixed(keys) % np.uint64(len(self._files))
        order = np.argsort(where, kind="stable")
        records, ends = records[order], np.searchsorted(where[order], np.arange(1, len(self._files) + 1))
        begin = 0
        for file, end in zip(self._files, ends.tolist(), strict=True):
            if end > begin:
                file.write(records[begin:end].tobytes())
            begin = end

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            yield np.fromfile(path, self._dtype)
            path.unlink()


def _chunks_of(path: Path) -> Iterator[NDArray[Any]]:
    with open(path, "rb") as file:
        while len(chunk := np.fromfile(file, _HASHED, _CHUNK_ROWS)):
            yield chunk


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64's finaliser: hashes of images are far from evenly spread."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(keys ^ (keys >> np.uint64(31)))
