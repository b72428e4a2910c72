"""The bytes: a format that others can read, reads that are few and exact, slices that are verified block by block."""

import gc
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractBufferedFile
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from trainer.checkpoint import records, storage
from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.checkpoint.folder import CheckpointFolder
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.records import Chunk, Index, Manifest, ObjectRecord, TensorRecord, dump, parse_index, xxh64
from trainer.errors import UserError


class CountingFileSystem(LocalFileSystem):
    """Counts the bytes and the requests of every read."""

    cachable = False
    bytes_read = 0
    requests = 0

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        data: bytes = super().cat_file(path, start, end, **kwargs)
        self.bytes_read += len(data)
        self.requests += 1
        return data


def manager(path: Path | str) -> CheckpointManager:
    return CheckpointManager(str(path), keep_last=2, config_digest="d", code_version="v")


def test_shards_are_safetensors(tmp_path: Path) -> None:
    tensors = {
        f"t.{dtype}".replace("torch.", ""): torch.arange(7).to(dtype) if dtype != torch.bool else torch.arange(7) > 3
        for dtype in storage.DTYPES.values()
    }
    tensors["scalar"] = torch.tensor(3.0)
    path = Path(manager(tmp_path).save(tensors, step=1, images_seen=1, state={}))
    loaded = load_file(path / "shard-00000.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)) if tensor.ndim else True
    index = json.loads((path / "index.json").read_text())
    assert all(
        chunk["begin"] % records.ITEM_BYTES[tensor["dtype"]] == 0
        for tensor in index["tensors"].values()
        for chunk in tensor["chunks"]
    )


def test_reads_are_about_what_is_needed_and_few(tmp_path: Path) -> None:
    tensors = {f"model.blocks.{i}.weight": torch.randn(300, 100) for i in range(100)}
    tensors |= {f"optim.state.{i}.step": torch.tensor(1.0) for i in range(100)}
    m = manager(tmp_path)
    m.save(tensors, step=1, images_seen=1, state={})
    m.folder.fs = fs = CountingFileSystem()
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    m.restore(into)
    needed = sum(tensor.nbytes for tensor in tensors.values())
    assert needed <= fs.bytes_read <= 1.1 * needed  # COMMIT, manifest and index included
    assert fs.requests <= 3 + math.ceil(needed / (16 << 20)) + 1
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors.items())


# ---------------------------------------------------------------------------------------------- slices, block by block


class OnePlan:
    """The part of a load planner that a reader uses, over one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self.target = target

    def resolve_tensor(self, item: ReadItem) -> torch.Tensor:
        return self.target

    def commit_tensor(self, item: ReadItem, tensor: torch.Tensor) -> None:
        pass


def slice_item(offsets: tuple[int, ...], lengths: tuple[int, ...]) -> ReadItem:
    zero = torch.Size([0] * len(offsets))
    where = MetadataIndex("x", zero, 0)
    return ReadItem(LoadItemType.TENSOR, where, zero, where, torch.Size(offsets), torch.Size(lengths))


def stored(folder: CheckpointFolder, tensor: torch.Tensor, block_bytes: int, lead: int = 8) -> Index:
    """`tensor` in a shard behind `lead` other bytes."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    folder.write("c/shard-00000.safetensors", b"\0" * lead + data)
    sums = tuple(xxh64(data[i : i + block_bytes]) for i in range(0, len(data), block_bytes))
    shape = tuple(tensor.shape)
    chunk = Chunk((0,) * tensor.ndim, shape, "shard-00000.safetensors", lead, sums)
    return Index(block_bytes, {"x": TensorRecord(storage.DTYPE_NAMES[tensor.dtype], shape, (chunk,))})


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_slice_comes_from_the_blocks_that_hold_it(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 13), min_size=1, max_size=3)))
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    lengths = tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    lead = data.draw(st.sampled_from([8, 3]))  # 3: elements not at multiples of their size
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    folder = CheckpointFolder("memory://slices")
    index = stored(folder, tensor, block_bytes=1024, lead=lead)
    target = torch.zeros(lengths, dtype=dtype)
    reader = storage.ShardReader(folder, "c", index)
    reader.read_data(LoadPlan([slice_item(offsets, lengths)]), OnePlan(target))  # type: ignore[arg-type]
    expected = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, lengths, strict=True))]
    assert torch.equal(target, expected)


def test_a_slice_reads_and_verifies_only_its_own_blocks(tmp_path: Path) -> None:
    tensor = torch.randn(64, 256)  # a row is one block
    folder = CheckpointFolder(str(tmp_path))
    (tmp_path / "c").mkdir()
    index = stored(folder, tensor, block_bytes=1024)
    shard = tmp_path / "c" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[8 + 20 * 1024] ^= 1
    shard.write_bytes(data)
    folder.fs = fs = CountingFileSystem()
    reader = storage.ShardReader(folder, "c", index)
    target = torch.zeros(4, 256)
    reader.read_data(LoadPlan([slice_item((10, 0), (4, 256))]), OnePlan(target))  # type: ignore[arg-type]
    assert torch.equal(target, tensor[10:14])
    assert fs.bytes_read == 4 * 1024
    with pytest.raises(CorruptCheckpoint, match=rf"x: checksum does not match at bytes {8 + 20 * 1024} to"):
        reader.read_data(LoadPlan([slice_item((18, 0), (4, 256))]), OnePlan(target))  # type: ignore[arg-type]


def test_large_tensors_have_a_checksum_per_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_BYTES", 4096)
    tensors = {"a": torch.randn(100, 100), "b": torch.randn(3)}
    m = manager(tmp_path)
    path = Path(m.save(tensors, step=1, images_seen=1, state={}))
    index = json.loads((path / "index.json").read_text())
    assert index["block_bytes"] == 4096
    assert len(index["tensors"]["a"]["chunks"][0]["xxh64"]) == math.ceil(40000 / 4096)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    m.restore(into)
    assert torch.equal(into["a"], tensors["a"])


# ------------------------------------------------------------------------------------------------- nothing is unpickled


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_values_that_dcp_would_pickle_are_refused_both_ways(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    (tmp_path / "c").mkdir()
    with pytest.raises(BaseException, match="a is not a tensor"):
        dcp.save(
            {"a": {1, 2}},
            storage_writer=storage.ShardWriter(folder, "c"),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    assert not list((tmp_path / "c").iterdir())
    where = MetadataIndex("a")
    item = ReadItem(LoadItemType.BYTE_IO, where, torch.Size([0]), where, torch.Size([0]), torch.Size([0]))
    with pytest.raises(UserError, match="a is not a tensor"):
        storage.ShardReader(folder, "c", Index(4096, {})).prepare_local_plan(LoadPlan([item]))


# ------------------------------------------------------------------------------------------------ an index that lies


GOOD = Chunk((0, 0), (4, 8), "shard-00000.safetensors", 100, ("0" * 16,))


def problem(chunks: list[dict[str, Any]], size: tuple[int, ...] = (4, 8), dtype: str = "F32") -> str:
    tree = {"block_bytes": 4096, "tensors": {"x": {"dtype": dtype, "size": size, "chunks": chunks}}}
    data = json.dumps(tree).encode()
    objects = (ObjectRecord("shard-00000.safetensors", 228, "0" * 16), ObjectRecord("index.json", 1, xxh64(data)))
    manifest = Manifest(1, 1, 1, "d", "v", {}, objects)
    with pytest.raises(CorruptCheckpoint) as e:
        parse_index(data, manifest, "w")
    return str(e.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"begin": 101}, "outside shard-00000"),
        ({"begin": -1}, "begin"),
        ({"begin": 2**80}, "begin"),
        ({"file": "shard-00001.safetensors"}, "outside shard-00001"),
        ({"file": "../../etc/passwd"}, "file"),
        ({"offsets": [1, 0]}, "outside the tensor"),
        ({"offsets": [0]}, "another rank"),
        ({"sizes": [4, 7]}, "28 of 32 elements"),
        ({"sizes": [4, "8"]}, "sizes"),
        ({"sizes": [2**40, 2**40]}, "outside the tensor"),
        ({"xxh64": []}, "too few or too many"),
        ({"xxh64": ["0" * 15]}, "xxh64"),
        ({"more": 1}, "more"),
    ],
)
def test_places_outside_their_file_or_tensor_are_refused(change: dict[str, Any], expected: str) -> None:
    chunk = {"offsets": [0, 0], "sizes": [4, 8], "file": GOOD.file, "begin": 100, "xxh64": ["0" * 16], **change}
    assert expected in problem([chunk])


def test_chunks_must_fill_the_tensor_and_the_type_be_known() -> None:
    chunk = json.loads(dump(Index(4096, {"x": TensorRecord("F32", (4, 8), (GOOD,))})))["tensors"]["x"]["chunks"][0]
    assert "0 of 32 elements" in problem([])
    assert "unknown type" in problem([chunk], dtype="object")


# ------------------------------------------------------------------------------------------- uploads to object stores


class Upload(AbstractBufferedFile):
    """An upload that becomes an object when it is closed, as on object stores."""

    def _initiate_upload(self) -> None:
        self.received = b""

    def _upload_chunk(self, final: bool = False) -> bool:
        self.received += self.buffer.getvalue()
        if final:
            self.fs.publish(self.path, self.received)
        return True


class UploadingFileSystem(MemoryFileSystem):
    cachable = False

    def open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        return Upload(self, path, mode) if mode == "wb" else super().open(path, mode, **kwargs)

    def publish(self, path: str, data: bytes) -> None:
        with super().open(path, "wb") as file:
            file.write(data)


def test_failed_upload_publishes_nothing() -> None:
    folder = CheckpointFolder("memory://uploads")
    folder.fs = fs = UploadingFileSystem()

    def fail() -> None:
        with folder.create("c/a") as file:
            file.write(b"half")
            raise RuntimeError("tensor gone")

    with pytest.raises(CheckpointError, match="tensor gone"):
        fail()
    gc.collect()  # a file that nobody closed is closed, and so published, when it is collected
    assert not fs.exists(folder.path("c/a"))
    folder.write("c/a", b"whole")
    assert folder.read("c/a", 0, 5).tobytes() == b"whole"


def test_a_read_past_the_end_is_corruption(tmp_path: Path) -> None:
    folder = CheckpointFolder(str(tmp_path))
    (tmp_path / "a").write_bytes(b"1234")
    assert np.array_equal(folder.read("a", 1, 3), np.frombuffer(b"23", dtype=np.uint8))
    with pytest.raises(CorruptCheckpoint, match="ends at byte 4"):
        folder.read("a", 1, 5)
    with pytest.raises(CorruptCheckpoint, match="missing"):
        folder.read("b", 0, 1)
    with pytest.raises(CorruptCheckpoint, match="more than"):
        folder.read_small("a", size=4, limit=3)
