"""The shards of an index in few bytes each, and their rows: where each lies in its shard, and what stands in it."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from data.schema import COLUMNS, Sample, Shard, parse_captions
from data.storage import DamagedShard

ReadBytes = Callable[[int, int], bytes]
"""(start, end) to the bytes of a shard's file from start to end - 1."""


class ShardTable(Sequence[Shard]):
    """Shards of an index. As objects, those of 300 million samples would take a gigabyte in each process."""

    def __init__(self, shards: Sequence[Shard], per_shard: Mapping[str, NDArray[Any]] | None = None) -> None:
        """
        Args:
            shards: their entries are kept once where they are equal.
            per_shard: what their entries have besides, a value a shard.
        """
        self._names = np.array([shard.name.encode() for shard in shards], dtype=np.bytes_)
        self.num_samples = np.array([shard.num_samples for shard in shards], dtype=np.int64)
        self.num_bytes = np.array([shard.num_bytes for shard in shards], dtype=np.int64)
        self.hashes = np.array([int(shard.hash, 16) for shard in shards], dtype=np.uint64)
        """xxh64 of each."""
        kept: dict[str, tuple[int, Mapping[str, Any]]] = {}
        keys = [json.dumps(shard.entry, sort_keys=True) for shard in shards]
        for key, shard in zip(keys, shards, strict=True):
            kept.setdefault(key, (len(kept), shard.entry))
        self._entries = [entry for _, entry in kept.values()]
        self._entry_of = np.array([kept[key][0] for key in keys], dtype=np.int32)
        self._per_shard = dict(per_shard or {})

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Shard: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Shard]: ...
    def __getitem__(self, index: int | slice) -> Shard | Sequence[Shard]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return Shard(
            name=self._names[index].decode(),
            num_samples=int(self.num_samples[index]),
            num_bytes=int(self.num_bytes[index]),
            hash=f"{int(self.hashes[index]):016x}",
            entry={
                **self._entries[self._entry_of[index]],
                **{name: values[index].item() for name, values in self._per_shard.items()},
            },
        )

    def __iter__(self) -> Iterator[Shard]:
        return (self[i] for i in range(len(self)))


def of_mds(shards: Sequence[Shard]) -> ShardTable:
    """Of MDS shards, whose entries are alike but for names and sizes."""
    columns = ("column_names", "column_encodings", "column_sizes")
    kept = ({name: shard.entry[name] for name in columns} for shard in shards)
    return ShardTable(
        [Shard(s.name, s.num_samples, s.num_bytes, s.hash, entry) for s, entry in zip(shards, kept, strict=True)]
    )


class MDSRows:
    """The rows of an MDS shard.

    A shard begins with the number of samples and the offset of each and of the end, all uint32. A sample begins with
    the sizes, uint32, of those of its columns that have no fixed one; the columns' values follow.
    """

    def __init__(self, read: ReadBytes, shard: Shard, where: str) -> None:
        """Reads the offsets.

        Raises:
            DamagedShard: they are not what the index says, or lead out of the file.
        """
        self._read, self.where = read, where
        self._names: list[str] = list(shard.entry["column_names"])
        self._sizes: list[int | None] = [size or None for size in shard.entry["column_sizes"]]
        self._num_variable = sum(size is None for size in self._sizes)
        head_bytes = 4 * (shard.num_samples + 2)
        if head_bytes > shard.num_bytes:
            raise DamagedShard(f"{where}: too small for {shard.num_samples} samples; build the dataset again")
        count, *offsets = np.frombuffer(read(0, head_bytes), dtype="<u4").tolist()
        if count != shard.num_samples:
            raise DamagedShard(f"{where}: holds {count} samples, the index says {shard.num_samples}; build it again")
        ascending = all(a <= b for a, b in pairwise(offsets))
        if not (ascending and head_bytes <= offsets[0] and offsets[-1] <= shard.num_bytes):
            raise DamagedShard(f"{where}: its offsets lead out of the file; build the dataset again")
        self._offsets = offsets

    def columns(self, row: int) -> dict[str, bytes]:
        """The encoded values of a row, by column.

        Raises:
            ValueError: the row is not laid out as its columns say.
        """
        data = self._read(self._offsets[row], self._offsets[row + 1])
        start = 4 * self._num_variable
        if len(data) < start:
            raise ValueError("it ends within its head")
        variable = deque(np.frombuffer(data, dtype="<u4", count=self._num_variable).tolist())
        values = {}
        for name, size in zip(self._names, self._sizes, strict=True):
            end = start + (variable.popleft() if size is None else size)
            values[name] = data[start:end]
            start = end
        if start != len(data):
            raise ValueError(f"its columns take {start} bytes, it has {len(data)}")
        return values

    def sample(self, row: int) -> Sample:
        """
        Raises:
            ValueError: it does not fit the training schema.
        """
        values = self.columns(row)
        key, image, captions, label = (values[name] for name in COLUMNS)
        if len(label) != 8:
            raise ValueError("its label is no int64")
        return Sample(
            key=key.decode(),
            image=image,
            captions=parse_captions(json.loads(captions)),
            label=int.from_bytes(label, "little", signed=True),
            columns={name: value for name, value in values.items() if name not in COLUMNS},
        )
