"""The training schema of an MDS dataset, and the two small files that make a folder of shards a dataset.

index.json      MDS's own: shards, their sizes, samples and xxh64 hashes
dataset.json    what the samples are; names the index it belongs to, and is written last
shard.*.mds     uncompressed; columns as in `COLUMNS`, image bytes as they came
labels.i32      if any: the `label` column again, one little-endian int32 a row, so that classes are known unread
NOTICE, ...     licence files of the source, as they came

Version 2 has kinds of captions, aspect buckets and labels.i32; version 1, which has none of them, is read as well.

Nothing in them is trusted: sizes are bounded, names stay in the folder, and encodings that unpickle are refused.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from trainer.errors import UserError

SCHEMA_VERSION = 2
READ_VERSIONS = (1, 2)
COLUMNS = {"key": "str", "image": "bytes", "captions": "json", "label": "int"}
"""Columns that every shard has, with their MDS encodings. A shard may hold further ones.

`captions` is a list of texts, which are then of the kind `original`, or an object: kind -> list of texts.
"""
ORIGINAL = "original"
"""The kind of captions that came with the image; recaptioning adds others, such as `short` and `detailed`."""
LABELS = "labels.i32"

INDEX = "index.json"
DATASET = "dataset.json"
REJECTED = "rejected.jsonl"
HASH = "xxh64"
MAX_INDEX_BYTES = 256 << 20
MAX_DATASET_BYTES = 16 << 20
MAX_SHARD_BYTES = 2**32 - 1
"""MDS keeps byte offsets as uint32."""

_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,200}")
_WORD = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$"


@dataclass(frozen=True)
class Sample:
    """One row of a dataset."""

    key: str
    image: bytes
    """A JPEG, PNG or WebP file."""
    captions: Mapping[str, tuple[str, ...]]
    """Texts by kind."""
    label: int
    """Index into `class_names`; -1 where none."""
    columns: Mapping[str, bytes] = field(default_factory=dict)
    """Values of further columns, by name."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Captions of all kinds, in the order in which they are stored."""
        return tuple(text for texts in self.captions.values() for text in texts)


class Resize(BaseModel):
    """What the build did to the images. Other methods change pixels, so the choice travels with the data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    short_side: Annotated[int, Field(gt=0)] | None = None
    """Larger images were shrunk to it, in pixels; absent: images as they came."""
    method: Literal["area"] = "area"
    format: Literal["keep", "jpeg", "webp"] = "keep"
    quality: int | None = None


class Bucket(BaseModel):
    """Images of about one shape: some shards that follow one another in the index."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,32}$")]
    """Such as `4:3`, width to height. Datasets that are mixed mean the same aspect by the same name."""
    aspect: Annotated[float, Field(ge=0.01, le=100.0)]
    """Width / height that its images are cropped to."""
    first_shard: Annotated[int, Field(ge=0)]
    """Index of its first shard in index.json."""
    num_shards: Annotated[int, Field(gt=0)]


class DatasetInfo(BaseModel):
    """dataset.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    name: str
    num_samples: Annotated[int, Field(ge=0)]
    index_digest: str
    """Of the index.json this belongs to."""
    resize: Resize = Resize()
    order_seed: int | None = None
    """Seed of the permutation that the rows were put in; absent: the source's order."""
    class_names: tuple[str, ...] | None = None
    notice: str | None = None
    """Text of the source's licence and notice files."""
    rejected: dict[str, int] = {}
    """Images of the source that are not in the dataset, by reason."""
    merged_rows: int = 0
    """Rows of the source that named an image again; their captions went to the first."""
    buckets: tuple[Bucket, ...] = ()
    """By ascending first shard; together they are all shards. Empty: images of any shape in any order."""
    caption_kinds: tuple[Annotated[str, Field(pattern=_WORD)], ...] = (ORIGINAL,)
    """Kinds of which at least one sample has a caption."""
    labels: Annotated[str, Field(pattern=f"^{_SHARD_NAME.pattern}$")] | None = None
    """Name of the file of labels, `LABELS`: 4 x num_samples bytes. Absent: classes are known only by reading samples."""
    labels_xxh64: Annotated[str, Field(pattern="^[0-9a-f]{16}$")] | None = None
    """Of that file's bytes."""
    licences: dict[str, int] = {}
    """Samples under each licence, as the sources name them; empty: not known."""
    columns: dict[Annotated[str, Field(pattern=_WORD)], dict[str, JsonValue]] = {}
    """What stands in further columns of the shards, by their names: whoever writes a column describes it."""

    @model_validator(mode="after")
    def _fields_agree(self) -> "DatasetInfo":
        end = 0
        for bucket in self.buckets:
            if bucket.first_shard != end:
                raise ValueError(f"buckets: {bucket.name} begins at shard {bucket.first_shard}, expected {end}")
            end += bucket.num_shards
        if len({bucket.name for bucket in self.buckets}) < len(self.buckets):
            raise ValueError("buckets: two have the same name")
        if (self.labels is None) != (self.labels_xxh64 is None):
            raise ValueError("labels and labels_xxh64: one is given without the other")
        return self

    @property
    def digest(self) -> str:
        """What a checkpoint is bound to: the index, and what else decides which sample stands where in the stream."""
        if not self.buckets and not self.labels_xxh64:
            return self.index_digest
        drawn_by = [self.index_digest, self.labels_xxh64, [bucket.model_dump() for bucket in self.buckets]]
        return hashlib.blake2b(json.dumps(drawn_by).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One shard, as the index describes it."""

    name: str
    num_samples: int
    num_bytes: int
    hash: str
    entry: Mapping[str, Any]
    """What the index says of its columns: `column_names`, `column_encodings` and `column_sizes`. Shared by shards alike."""


def index_digest(index: bytes) -> str:
    """Of index.json's bytes; stands for the samples, since the index holds every shard's hash."""
    return hashlib.blake2b(index, digest_size=16, person=b"loupe-v1").hexdigest()


def parse_captions(value: Any) -> dict[str, tuple[str, ...]]:
    """The `captions` column of a row: texts by kind. Kinds without texts are left out.

    Raises:
        ValueError: neither a list of texts nor an object of such.
    """
    by_kind = {ORIGINAL: value} if isinstance(value, list) else value
    if not isinstance(by_kind, dict) or not all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in by_kind.values()
    ):
        raise ValueError("captions are neither a list of texts nor lists of texts by kind")
    return {kind: tuple(texts) for kind, texts in by_kind.items() if texts}


def parse_dataset(data: bytes, *, source: str) -> DatasetInfo:
    """dataset.json's content; `source` names the file in errors.

    Raises:
        UserError: not ours, or of another version.
    """
    tree = _json_object(data, source)
    version = tree.get("schema_version")
    if version not in READ_VERSIONS:
        raise UserError(
            f"{source}: schema_version is {version!r}, this code reads {' and '.join(map(str, READ_VERSIONS))}; build "
            "the dataset again"
        )
    try:
        return DatasetInfo.model_validate(tree)
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        what = f"{field}: {first['msg']}" if field else first["msg"].removeprefix("Value error, ")
        raise UserError(f"{source}: {what}; build the dataset again") from None


def parse_index(data: bytes, *, source: str) -> tuple[Shard, ...]:
    """The shards of an index.json.

    Raises:
        UserError: not MDS, compressed, without hashes, without a column, or unsafe to read.
    """
    tree = _json_object(data, source)
    shards = tree.get("shards")
    if tree.get("version") != 2 or not isinstance(shards, list):
        raise UserError(f"{source}: not the index of an MDS dataset (version 2); build one with `loupe data build`")
    columns: dict[str, dict[str, Any]] = {}
    parsed = tuple(_shard(entry, f"{source}: shard {i}", columns) for i, entry in enumerate(shards))
    if len({shard.name for shard in parsed}) < len(parsed):
        raise UserError(f"{source}: names a shard twice; build the dataset again")
    if not sum(shard.num_samples for shard in parsed):
        raise UserError(f"{source}: the dataset is empty; build it again from a source with images")
    return parsed


def _shard(entry: Any, where: str, columns: dict[str, dict[str, Any]]) -> Shard:
    """`columns`: those that were found good, by their text; a huge index has 400,000 shards with the same ones."""
    raw = entry.get("raw_data") if isinstance(entry, dict) else None
    if not isinstance(raw, dict) or entry.get("format") != "mds" or entry.get("version") != 2:
        raise UserError(f"{where}: not MDS; build the dataset with `loupe data build`")
    if entry.get("compression") or entry.get("zip_data"):
        raise UserError(f"{where}: is compressed; write MDS shards with compression=None")
    name, num_bytes, num_samples = raw.get("basename"), raw.get("bytes"), entry.get("samples")
    if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
        raise UserError(f"{where}: the name {name!r} is not a plain file name; this index is not to be trusted")
    if not _is_count(num_bytes, MAX_SHARD_BYTES) or not _is_count(num_samples, MAX_SHARD_BYTES // 4):
        raise UserError(f"{where}: impossible size ({num_bytes!r} bytes, {num_samples!r} samples); build it again")
    hashes = raw.get("hashes")
    digest = hashes.get(HASH) if isinstance(hashes, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{16}", digest):
        raise UserError(f"{where}: has no {HASH} hash; write MDS shards with hashes=['{HASH}']")
    of_shard = {f"column_{what}": entry.get(f"column_{what}") for what in ("names", "encodings", "sizes")}
    key = repr(of_shard)
    if key not in columns:
        _check_columns(of_shard, where)
        columns[key] = of_shard
    assert isinstance(num_bytes, int)
    assert isinstance(num_samples, int)
    return Shard(name=name, num_samples=num_samples, num_bytes=num_bytes, hash=digest, entry=columns[key])


def _check_columns(entry: dict[str, Any], where: str) -> None:
    names, encodings, sizes = (entry.get(f"column_{what}") for what in ("names", "encodings", "sizes"))
    if not (
        isinstance(names, list)
        and isinstance(encodings, list)
        and isinstance(sizes, list)
        and len(names) == len(encodings) == len(sizes)
        and all(isinstance(word, str) for word in (*names, *encodings))
    ):
        raise UserError(f"{where}: its columns are malformed; build the dataset again")
    for column, encoding in zip(names, encodings, strict=True):
        if encoding.partition(":")[0] in ("pkl", "pickle"):
            raise UserError(f"{where}: column {column!r} is encoded as {encoding!r}, which runs code when read; "
                            "write it in another encoding")  # fmt: skip
    found = dict(zip(names, encodings, strict=True))
    for column, encoding in COLUMNS.items():
        if column not in found:
            raise UserError(f"{where}: no column {column!r}; the training schema is "
                            + ", ".join(f"{c}: {e}" for c, e in COLUMNS.items()))  # fmt: skip
        if found[column] != encoding:
            raise UserError(f"{where}: column {column!r} is encoded as {found[column]!r}, expected {encoding!r}")


def _is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _json_object(data: bytes, source: str) -> dict[str, Any]:
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{source}: not JSON ({e}); the file is damaged, build the dataset again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{source}: not a JSON object; the file is not ours or is damaged")
    return tree
