"""WebDataset tars trained on as they are, through an index of where each sample lies; `loupe data index` builds it.

index.json             tars, their sizes, samples and xxh64 hashes, and of each the hash of its file of rows
dataset.json           as of any dataset; written last
labels.i32             if any sample has a label
rows/NAME.tar.rows     where the samples of a tar lie, one file a tar: int64 (samples, 6), int64 (samples,), then keys

They lie beside the tars, of a single tar in NAME.tar.index/, or elsewhere and then name the tars' URL.
"""

import json
import re
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.schema import ORIGINAL, Sample, Shard
from data.shards import ReadBytes, ShardTable
from data.storage import DamagedShard, Storage
from trainer.errors import UserError

FORMAT, VERSION = "loupe-tars", 1
TAR_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._=-]{0,200}/){0,8}[A-Za-z0-9_][A-Za-z0-9._=-]{0,200}\.tar")
"""Of a tar below the folder that is indexed."""
ROW_FIELDS = ("image_offset", "image_size", "caption_offset", "caption_size", "caption_is_json", "label")
"""caption_size and label are -1 where there is none."""
MAX_CAPTION_BYTES = 1 << 20
MAX_IMAGE_BYTES = 1 << 28

_MAX_TAR_BYTES = 1 << 42
_MAX_SAMPLES = 1 << 26
_MAX_ROWS_BYTES = 1 << 33
_MAX_GAP_BYTES = 1 << 16
"""Read along rather than asked for apart."""


def index_folder(url: str) -> str:
    """Where the index of a dataset at `url` lies."""
    return f"{url.rstrip('/')}.index" if url.rstrip("/").endswith(".tar") else url


def tars_folder(url: str) -> str:
    """The folder of a URL that names one or a single tar."""
    url = url.rstrip("/")
    return url.rpartition("/")[0] or "." if url.endswith(".tar") else url


def rows_name(tar: str) -> str:
    return f"rows/{tar}.rows"


def is_tar_index(index: bytes) -> bool:
    return FORMAT.encode() in index[:200]


def make_tar_index(tars_url: str | None, shards: list[tuple[Shard, int, str]]) -> bytes:
    """index.json. `tars_url`: None where it lies beside the tars; `shards`: with size and hash of their files of rows."""
    entries = [
        {"tar": s.name, "samples": s.num_samples, "bytes": s.num_bytes, "xxh64": s.hash,
         "rows": {"bytes": rows_bytes, "xxh64": rows_hash}}
        for s, rows_bytes, rows_hash in shards
    ]  # fmt: skip
    return json.dumps({"format": FORMAT, "version": VERSION, "tars_url": tars_url, "tars": entries}, indent=1).encode()


def parse_tar_index(index: bytes, *, source: str, beside: str) -> tuple[ShardTable, str]:
    """The tars as shards, and their folder.

    Args:
        source: names the file in errors.
        beside: the URL that was asked for.

    Raises:
        UserError: not ours, or of another version.
    """
    try:
        tree = json.loads(index)
        if tree["format"] != FORMAT or tree["version"] != VERSION or not tree["tars"]:
            raise ValueError(f"format {tree['format']!r}, version {tree['version']!r}")
        shards = [_shard(entry) for entry in tree["tars"]]
        rows = [(_number(e["rows"]["bytes"], _MAX_ROWS_BYTES), _hash(e["rows"]["xxh64"])) for e in tree["tars"]]
        tars_url = tree["tars_url"]
        if tars_url is not None and not isinstance(tars_url, str):
            raise TypeError("tars_url is no text")
        if len({shard.name for shard in shards}) < len(shards):
            raise ValueError("names a tar twice")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{source}: not an index of tars ({e}); build it again with `loupe data index`") from None
    per_shard: dict[str, NDArray[Any]] = {
        "rows_bytes": np.array([num_bytes for num_bytes, _ in rows], dtype=np.int64),
        "rows_hash": np.array([int(digest, 16) for _, digest in rows], dtype=np.uint64),
    }
    return ShardTable(shards, per_shard), tars_url if tars_url is not None else tars_folder(beside)


def _shard(entry: Any) -> Shard:
    name = entry["tar"]
    if not isinstance(name, str) or not TAR_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is not the plain name of a tar")
    return Shard(
        name=name,
        num_samples=_number(entry["samples"], _MAX_SAMPLES),
        num_bytes=_number(entry["bytes"], _MAX_TAR_BYTES),
        hash=_hash(entry["xxh64"]),
        entry={},
    )


def _number(value: Any, limit: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise ValueError(f"impossible size {value!r}")
    return value


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{16}", value):
        raise ValueError(f"{value!r} is no xxh64")
    return value


# ----------------------------------------------------------------------------------------------------------------- rows


def pack_rows(rows_NF: NDArray[np.int64], keys: list[str]) -> bytes:
    """A file of rows."""
    encoded = [key.encode() for key in keys]
    ends_N = np.cumsum([len(key) for key in encoded], dtype=np.int64)
    return rows_NF.astype("<i8").tobytes() + ends_N.astype("<i8").tobytes() + b"".join(encoded)


class TarRows:
    """The rows of an indexed tar."""

    def __init__(self, data: bytes, read: ReadBytes, shard: Shard, where: str) -> None:
        """`data`: the file of rows.

        Raises:
            DamagedShard: it leads out of the tar.
        """
        self._read, self._name, self.where = read, shard.name, where
        count = shard.num_samples
        fixed = count * 8 * (len(ROW_FIELDS) + 1)
        if len(data) < fixed:
            raise DamagedShard(f"{where}: its file of rows is too small; build it again with `loupe data index`")
        numbers = np.frombuffer(data, dtype="<i8", count=count * (len(ROW_FIELDS) + 1))
        self._rows_NF = numbers[: count * len(ROW_FIELDS)].reshape(count, len(ROW_FIELDS))
        self._key_ends_N = numbers[count * len(ROW_FIELDS) :]
        self._keys = data[fixed:]
        image, caption = self._rows_NF[:, 0:2], self._rows_NF[:, 2:4]
        inside = (
            (image >= 0).all()
            and (image[:, 1] <= MAX_IMAGE_BYTES).all()
            and (image.sum(1) <= shard.num_bytes).all()
            and (caption[:, 0] >= 0).all()
            and (caption[:, 1] <= MAX_CAPTION_BYTES).all()
            and (caption.sum(1) <= shard.num_bytes).all()
            and (np.diff(self._key_ends_N, prepend=0) >= 0).all()
            and (not count or self._key_ends_N[-1] == len(self._keys))
        )
        if not inside:
            raise DamagedShard(f"{where}: its rows lead out of the tar; build them again with `loupe data index`")

    @classmethod
    def open(cls, read: ReadBytes, shard: Shard, where: str, index: Storage, deadline_s: float) -> "TarRows":
        """With its file of rows, fetched and verified.

        Raises:
            DamagedShard: the file of rows is missing or not what the index says.
            StorageError: storage does not answer.
        """
        name = rows_name(shard.name)
        try:
            data = index.read(name, max_bytes=shard.entry["rows_bytes"], deadline_s=deadline_s)
        except FileNotFoundError:
            data = b""
        if xxhash.xxh64_intdigest(data) != shard.entry["rows_hash"]:
            raise DamagedShard(f"{index.url}/{name}: missing or damaged; build it again with `loupe data index`")
        return cls(data, read, shard, where)

    def sample(self, row: int) -> Sample:
        """
        Raises:
            ValueError: its caption is not what the index saw.
        """
        image_start, image_size, caption_start, caption_size, is_json, label = self._rows_NF[row].tolist()
        start = int(self._key_ends_N[row - 1]) if row else 0
        key = self._keys[start : int(self._key_ends_N[row])].decode()
        image, caption = self._image_and_caption(image_start, image_size, caption_start, max(caption_size, 0))
        text = json_caption(caption) if is_json else caption.decode().strip()
        return Sample(
            key=f"{self._name}/{key}", image=image, captions={ORIGINAL: (text,)} if text else {}, label=int(label)
        )

    def _image_and_caption(self, a: int, a_size: int, b: int, b_size: int) -> tuple[bytes, bytes]:
        """In one read where they lie near each other, as they do."""
        if not b_size:
            return self._read(a, a + a_size), b""
        first, end = min(a, b), max(a + a_size, b + b_size)
        if end - first - a_size - b_size > _MAX_GAP_BYTES:
            return self._read(a, a + a_size), self._read(b, b + b_size)
        data = self._read(first, end)
        return data[a - first : a - first + a_size], data[b - first : b - first + b_size]


def json_caption(data: bytes) -> str:
    """The `caption` of a sample's .json; empty where it has none.

    Raises:
        ValueError: not a JSON object.
    """
    try:
        tree = json.loads(data)
    except RecursionError:
        raise ValueError("its .json is nested too deeply") from None
    if not isinstance(tree, dict):
        raise ValueError("its .json is no object")
    caption = tree.get("caption")
    return caption.strip() if isinstance(caption, str) else ""
