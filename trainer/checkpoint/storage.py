"""Storage for torch.distributed.checkpoint: its planners decide who writes and reads which part of which tensor, this
module moves the bytes. A rank's parts go into one safetensors file; where everything lies goes into index.json.

Only tensors pass. Other values DCP would pickle, and unpickle on load: here they are refused both ways.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.folder import INDEX, CheckpointFolder
from trainer.checkpoint.records import (
    BLOCK_BYTES,
    INDEX_LIMIT,
    ITEM_BYTES,
    Chunk,
    Index,
    ObjectRecord,
    TensorRecord,
    chunk_bytes,
    dump,
    xxh64,
)
from trainer.errors import UserError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32,
    "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

RUN_BYTES = 64 << 20
"""Neighbouring reads are joined up to this size, to bound host memory; a larger chunk is read whole."""
GAP_BYTES = 16 << 10
"""Unneeded bytes between two reads that are read along rather than pay for another request."""

StoredChunk = tuple[Chunk, ObjectRecord]


def refuse_all_but_tensors(name: str, value: object) -> None:
    if not isinstance(value, torch.Tensor):
        raise UserError(f"checkpoint: {name} is a {type(value).__name__}, not a tensor; put it into `state`, as JSON")
    if value.is_meta:
        raise UserError(f"checkpoint: {name} is on the meta device and has no storage; materialise the model first")
    if value.dtype not in DTYPE_NAMES:
        raise UserError(
            f"checkpoint: {name} has type {value.dtype}; safetensors knows {', '.join(map(str, DTYPES.values()))}"
        )


# --------------------------------------------------------------------------------------------------------------- write


class ShardWriter(StorageWriter):
    """Writes into an existing, empty checkpoint. After `dcp.save`, rank 0 has in `objects` all that was written."""

    def __init__(self, folder: CheckpointFolder, checkpoint: str) -> None:
        self._folder, self._checkpoint = folder, checkpoint
        self.objects: tuple[ObjectRecord, ...] = ()

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A writer serves one checkpoint; there is nothing to reset."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the checkpoint was made, and agreed by all ranks, before."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise UserError(f"checkpoint: {item.index.fqn} is not a tensor; put it into `state`, as JSON")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return [
            dataclasses.replace(plan, storage_data=f"shard-{rank:05d}.safetensors") for rank, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # In this thread: errors of worker threads get lost, and one stream a rank fills the link to storage.
        results = self._write_shard(plan.storage_data, plan.items, planner) if plan.items else []
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write_shard(self, file_name: str, items: list[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        items = sorted(items, key=_order)
        header = _safetensors_header(items)
        whole = xxhash.xxh64(header)
        position = len(header)
        placed = []
        name = f"{self._checkpoint}/{file_name}"
        with self._folder.create(name) as file:
            file.write(header)
            for item in items:
                data = _bytes_of(planner.resolve_data(item), item)
                blocks = [data[i : i + BLOCK_BYTES].data for i in range(0, len(data), BLOCK_BYTES)]
                for block in blocks:
                    whole.update(block)
                    file.write(block)
                box = _box(item)
                chunk = Chunk(tuple(box.offsets), tuple(box.sizes), file_name, position, tuple(map(xxh64, blocks)))
                placed.append((item, chunk, len(data)))
                position += len(data)
        record = ObjectRecord(file_name, position, whole.hexdigest())
        return [
            WriteResult(index=item.index, size_in_bytes=length, storage_data=(chunk, record))
            for item, chunk, length in placed
        ]

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        data = dump(_index(metadata, (result for of_rank in results for result in of_rank)))
        if len(data) > INDEX_LIMIT:
            raise CheckpointError(f"{self._checkpoint}/{INDEX}: {len(data)} bytes, more than {INDEX_LIMIT} can be read")
        self._folder.write(f"{self._checkpoint}/{INDEX}", data)
        shards = {of_rank[0].storage_data[1] for of_rank in results if of_rank}
        index = ObjectRecord(INDEX, len(data), xxh64(data))
        self.objects = (*sorted(shards, key=lambda record: record.path), index)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # DCP never chooses this class from a path


def _box(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _order(item: WriteItem) -> tuple[Any, ...]:
    """Larger elements first, so that each lies at a multiple of its size; the many small tensors together (step counts,
    biases), as every rank may want those that this one writes for all."""
    assert item.tensor_data is not None
    item_bytes = item.tensor_data.properties.dtype.itemsize
    is_large = math.prod(_box(item).sizes) * item_bytes > GAP_BYTES
    return -item_bytes, is_large, item.index.fqn, tuple(item.index.offset or ())


def _safetensors_header(items: list[WriteItem]) -> bytes:
    """The header that describes `items` one behind the other: 8 bytes with its length, then JSON, padded to 8."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for item in items:
        box, tensor = _box(item), item.tensor_data
        assert tensor is not None
        # A file of one rank can hold several parts of a tensor; the whole one goes by its plain name.
        part = "" if box.sizes == tensor.size else "@" + ",".join(map(str, box.offsets))
        end = position + math.prod(box.sizes) * tensor.properties.dtype.itemsize
        name = item.index.fqn + part
        assert name not in tree, name
        tree[name] = {"dtype": DTYPE_NAMES[tensor.properties.dtype], "shape": list(box.sizes),
                      "data_offsets": [position, end]}  # fmt: skip
        position = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(value: object, item: WriteItem) -> "np.ndarray[Any, np.dtype[np.uint8]]":
    """A tensor's elements in host memory, row-major. A CPU tensor that is contiguous is not copied."""
    assert isinstance(value, torch.Tensor)
    assert value.shape == _box(item).sizes, (item.index, value.shape)
    array: np.ndarray[Any, np.dtype[np.uint8]] = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return array


def _index(metadata: Metadata, results: Iterable[WriteResult]) -> Index:
    placed = {(result.index.fqn, tuple(result.index.offset or ())): result.storage_data[0] for result in results}
    tensors = {}
    for fqn, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata)
        chunks = tuple(placed.pop((fqn, tuple(chunk.offsets))) for chunk in tensor.chunks)
        tensors[fqn] = TensorRecord(DTYPE_NAMES[tensor.properties.dtype], tuple(tensor.size), chunks)
    assert not placed, list(placed)[:3]
    return Index(BLOCK_BYTES, tensors)


# ---------------------------------------------------------------------------------------------------------------- read


@dataclass(frozen=True)
class _Read:
    """Whole blocks of a chunk, which hold what `item` asks for."""

    item: ReadItem
    tensor: TensorRecord
    chunk: Chunk
    first_block: int
    begin: int
    end: int
    """Bytes [begin, end) of the file."""
    skip: int
    """Bytes from `begin` to the item's first element."""


class ShardReader(StorageReader):
    """Reads the tensors of a checkpoint whose index has been verified. Each byte that is used was checked by the rank
    that uses it."""

    def __init__(self, folder: CheckpointFolder, checkpoint: str, index: Index) -> None:
        self._folder, self._checkpoint, self._index = folder, checkpoint, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """A reader serves one checkpoint; there is nothing to reset."""

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        return Metadata(
            {
                fqn: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.size),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks],
                )
                for fqn, tensor in self._index.tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing: the index was read and agreed by all ranks before."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                raise UserError(f"checkpoint: {item.dest_index.fqn} is not a tensor; it belongs into `state`, as JSON")
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for run in _joined(self._locate(item) for item in plan.items if math.prod(item.lengths)):
            self._read_run(run, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _locate(self, item: ReadItem) -> _Read:
        tensor = self._index.tensors[item.storage_index.fqn]
        assert item.storage_index.index is not None
        chunk = tensor.chunks[item.storage_index.index]
        assert chunk.offsets == tuple(item.storage_index.offset or ()), item.storage_index
        strides, item_bytes = _strides(chunk.sizes), ITEM_BYTES[tensor.dtype]
        first = sum(o * s for o, s in zip(item.storage_offsets, strides, strict=True)) * item_bytes
        last = first + sum((n - 1) * s for n, s in zip(item.lengths, strides, strict=True)) * item_bytes
        block = self._index.block_bytes
        first_block, end_block = first // block, -(-(last + item_bytes) // block)
        end = min(end_block * block, chunk_bytes(chunk, tensor.dtype))
        return _Read(
            item, tensor, chunk, first_block, chunk.begin + first_block * block, chunk.begin + end,
            first - first_block * block,
        )  # fmt: skip

    def _read_run(self, run: list[_Read], planner: LoadPlanner) -> None:
        name = f"{self._checkpoint}/{run[0].chunk.file}"
        begin = run[0].begin
        buffer = self._folder.read(name, begin, max(read.end for read in run))
        for read in run:
            data = buffer[read.begin - begin : read.end - begin]
            self._verify(read, data, name)
            _copy(read, data, planner)

    def _verify(self, read: _Read, data: "np.ndarray[Any, np.dtype[np.uint8]]", name: str) -> None:
        block = self._index.block_bytes
        for i, start in enumerate(range(0, len(data), block)):
            if xxh64(data[start : start + block].data) != read.chunk.xxh64[read.first_block + i]:
                raise CorruptCheckpoint(
                    f"{self._folder.url_of(name)}: {read.item.storage_index.fqn}: checksum does not match at bytes "
                    f"{read.begin + start} to {read.begin + min(start + block, len(data))}"
                )

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False  # DCP never chooses this class from a path


def _strides(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major, in elements."""
    return tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))


def _joined(reads: Iterable[_Read]) -> Iterator[list[_Read]]:
    """Reads in the order of their files and places, neighbours together."""
    run: list[_Read] = []
    end = 0
    for read in sorted(reads, key=lambda read: (read.chunk.file, read.begin, read.end)):
        near = run and read.chunk.file == run[0].chunk.file and read.begin <= end + GAP_BYTES
        if run and not (near and max(end, read.end) - run[0].begin <= RUN_BYTES):
            yield run
            run, end = [], 0
        run.append(read)
        end = max(end, read.end)
    if run:
        yield run


def _copy(read: _Read, data: "np.ndarray[Any, np.dtype[np.uint8]]", planner: LoadPlanner) -> None:
    """Put the item's part of verified blocks where the planner wants it, on whatever device that is."""
    dtype = DTYPES[read.tensor.dtype]
    usable = (len(data) - read.skip) // dtype.itemsize * dtype.itemsize
    elements = torch.from_numpy(data[read.skip : read.skip + usable])
    if elements.data_ptr() % dtype.itemsize:
        elements = elements.clone()  # only in a file whose order of elements is not ours
    source = elements.view(dtype).as_strided(tuple(read.item.lengths), _strides(read.chunk.sizes))
    target = planner.resolve_tensor(read.item).detach()
    if source.shape != target.shape:
        raise CheckpointError(f"{read.item.dest_index.fqn}: {tuple(source.shape)} does not fit {tuple(target.shape)}")
    target.copy_(source)
    planner.commit_tensor(read.item, target)
