"""What a checkpoint says about itself: COMMIT, manifest.json and index.json, read as untrusted input. No torch.

COMMIT holds the manifest's checksum, the manifest every object's, the index one for each block of each tensor. They
protect against damage, not against forgery: who can write the folder can write a checkpoint.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import xxhash
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from trainer.checkpoint.errors import CorruptCheckpoint
from trainer.errors import UserError

FORMAT = "loupe-checkpoint"
VERSION = 1

COMMIT_LIMIT = 64 << 10
MANIFEST_LIMIT = 64 << 20
INDEX_LIMIT = 1 << 30
"""Largest sizes in bytes that are read. An index has about 120 bytes a chunk."""

BLOCK_BYTES = 4 << 20
"""Bytes of a tensor's chunk that share a checksum: what a rank reads beyond its part, at most twice a chunk."""

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Types by their names in safetensors."""

STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Shape = Annotated[tuple[Count, ...], Field(max_length=16)]
XXH64 = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{5,9}\.safetensors$")]
ObjectName = Annotated[str, Field(pattern=r"^(shard-[0-9]{5,9}\.safetensors|index\.json)$")]


def xxh64(data: Any) -> str:
    """Checksum of a bytes-like object, 16 hexadecimal digits."""
    return xxhash.xxh64_hexdigest(data)


@dataclass(frozen=True, slots=True, config=STRICT)
class ObjectRecord:
    path: ObjectName
    """Within the checkpoint."""
    bytes: Count
    xxh64: XXH64


@dataclass(frozen=True, slots=True, config=STRICT)
class Chunk:
    """A box of a tensor, row-major in `file` from byte `begin`."""

    offsets: Shape
    sizes: Shape
    file: ShardName
    begin: Count
    xxh64: tuple[XXH64, ...]
    """Of each block of `block_bytes`; the last may be shorter."""


@dataclass(frozen=True, slots=True, config=STRICT)
class TensorRecord:
    dtype: str
    size: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, config=STRICT)
class Index:
    block_bytes: Annotated[int, Field(ge=1 << 10, le=1 << 30)]
    tensors: dict[str, TensorRecord]


@dataclass(frozen=True, slots=True, config=STRICT)
class Manifest:
    step: Count
    images_seen: Count
    world_size: Annotated[int, Field(ge=1)]
    config_digest: str
    code_version: str
    state: dict[str, Any]
    """The caller's own."""
    objects: tuple[ObjectRecord, ...]


@dataclass(frozen=True, slots=True, config=STRICT)
class Commit:
    format: Literal["loupe-checkpoint"]
    version: Literal[1]
    manifest_bytes: Count
    manifest_xxh64: XXH64
    xxh64: XXH64
    """Of this record without this field, as sorted JSON: a damaged version number is not taken for another version."""


R = TypeVar("R", Commit, Manifest, Index)


def dump(record: Manifest | Index) -> bytes:
    return TypeAdapter(type(record)).dump_json(record)


def _parse(kind: type[R], data: bytes, where: str) -> R:
    try:
        return TypeAdapter(kind).validate_json(data)
    except ValidationError as e:
        first = e.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise CorruptCheckpoint(f"{where}: {field}: {first['msg']}") from None


# --------------------------------------------------------------------------------------------------------------- COMMIT


def commit_for(manifest: bytes) -> bytes:
    tree = {"format": FORMAT, "version": VERSION, "manifest_bytes": len(manifest), "manifest_xxh64": xxh64(manifest)}
    return json.dumps({**tree, "xxh64": _seal(tree)}, sort_keys=True).encode() + b"\n"


def _seal(tree: Mapping[str, Any]) -> str:
    return xxh64(json.dumps(tree, sort_keys=True).encode())


def parse_commit(data: bytes, where: str) -> Commit:
    """
    Raises:
        UserError: whole, but another program's or of another version of the format.
        CorruptCheckpoint: damaged.
    """
    try:
        tree = json.loads(data)
        seal = tree.pop("xxh64")
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise CorruptCheckpoint(f"{where}: not a commit record") from None
    if seal != _seal(tree):
        raise CorruptCheckpoint(f"{where}: its checksum does not match")
    found = (tree.get("format"), tree.get("version"))
    if found != (FORMAT, VERSION):
        raise UserError(
            f"{where}: written as {found[0]} version {found[1]}, this code reads {FORMAT} version {VERSION}; "
            "continue with the code that wrote it, or take another run folder"
        )
    return _parse(Commit, data, where)


# ------------------------------------------------------------------------------------------------------------- manifest


def parse_manifest(data: bytes, commit: Commit, where: str) -> Manifest:
    if xxh64(data) != commit.manifest_xxh64:
        raise CorruptCheckpoint(f"{where}: its checksum does not match COMMIT")
    manifest = _parse(Manifest, data, where)
    paths = [record.path for record in manifest.objects]
    if len(set(paths)) != len(paths) or "index.json" not in paths:
        raise CorruptCheckpoint(f"{where}: objects: listed twice, or without index.json")
    return manifest


def check_sizes(objects: tuple[ObjectRecord, ...], sizes: Mapping[str, int], where: str) -> None:
    """Every object must be in the listing with its recorded size."""
    for record in objects:
        if record.path not in sizes:
            raise CorruptCheckpoint(f"{where}/{record.path}: missing")
        if sizes[record.path] != record.bytes:
            raise CorruptCheckpoint(f"{where}/{record.path}: {sizes[record.path]} bytes, {record.bytes} were written")


# ---------------------------------------------------------------------------------------------------------------- index


def parse_index(data: bytes, manifest: Manifest, where: str) -> Index:
    """The index, every place in it within its file and every chunk within its tensor."""
    objects = {record.path: record for record in manifest.objects}
    if xxh64(data) != objects["index.json"].xxh64:
        raise CorruptCheckpoint(f"{where}: its checksum does not match the manifest")
    index = _parse(Index, data, where)
    for name, tensor in index.tensors.items():
        problem = _problem(tensor, index.block_bytes, objects)
        if problem:
            raise CorruptCheckpoint(f"{where}: tensor {name}: {problem}")
    return index


def _problem(tensor: TensorRecord, block_bytes: int, objects: Mapping[str, ObjectRecord]) -> str | None:
    if tensor.dtype not in ITEM_BYTES:
        return f"unknown type {tensor.dtype}"
    elements = 0
    for chunk in tensor.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(tensor.size):
            return "a chunk of another rank"
        if any(
            offset + size > full for offset, size, full in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
        ):
            return "a chunk outside the tensor"
        length = chunk_bytes(chunk, tensor.dtype)
        if chunk.file not in objects or chunk.begin + length > objects[chunk.file].bytes:
            return f"a chunk outside {chunk.file}"
        if len(chunk.xxh64) != -(-length // block_bytes):
            return "a checksum too few or too many"
        elements += math.prod(chunk.sizes)
    if elements != math.prod(tensor.size):
        return f"{elements} of {math.prod(tensor.size)} elements"
    return None


def chunk_bytes(chunk: Chunk, dtype: str) -> int:
    return math.prod(chunk.sizes) * ITEM_BYTES[dtype]
