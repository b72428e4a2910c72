"""Folders of images: their listing, and parts of a slice of it."""

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from data.ahead import in_order
from data.images import ImageError
from data.ingest.examine import Filters, Found, PartWriter
from data.ingest.ranges import TooLarge, filesystem, is_local, read_object
from data.source import METADATA, Listed, clean, list_images, words
from data.stages.runner import PART_SAMPLES, Part, Work
from data.stages.samples import MAX_INDEX_BYTES, fetch
from data.stages.store import Json
from trainer.errors import UserError
from trainer.urls import public_source, public_url

SLICE_FILES = PART_SAMPLES
"""Of an item."""
MAX_NOTICE_BYTES = 1 << 20
_LISTED_AT_ONCE = 10 * SLICE_FILES
_MAX_TEXT_BYTES = 1 << 20
_LOCAL_THREADS, _REMOTE_THREADS = 2, 16
_LAYOUTS = {"metadata": METADATA, "texts": "texts", "classes": "classes"}
_ENTRIES = pa.schema(
    [
        ("key", pa.string()), ("file", pa.string()), ("captions", pa.list_(pa.string())), ("text", pa.string()),
        ("class_name", pa.string()), ("note", pa.string()), ("licence", pa.string()), ("source", pa.string()),
    ]
)  # fmt: skip


def list_folder(work: Work, layout: str, cursor: Json, *, uncaptioned: bool) -> Iterator[Part]:
    """A folder's images: files with the role `entries`. The cursor is the next image."""
    begin = cursor["image"] if cursor else 0
    listing = list_images(work.item["url"], _LAYOUTS.get(layout), uncaptioned=uncaptioned)
    if begin and (begin > len(listing.images) or listing.images[begin - 1].key != cursor["key"]):
        raise UserError(
            f"{work.item['url']}: has changed since its first {begin} images were listed; begin anew in another folder"
        )
    first = {"merged_rows": listing.merged_rows, "left_out": listing.left_out, "no_row": len(listing.no_row)}
    while begin < len(listing.images):
        some = listing.images[begin : begin + _LISTED_AT_ONCE]
        counts = {"listed": len(some), **({k: v for k, v in first.items() if v} if begin == 0 else {})}
        begin += len(some)
        path = work.scratch / "entries.parquet"
        rows = [_entry(image) for image in some]
        pq.write_table(pa.Table.from_pylist(rows, schema=_ENTRIES), path, compression="zstd")
        work.advance(len(some))
        yield Part({"entries": path}, counts, {"image": begin, "key": some[-1].key})


def _entry(image: Listed) -> dict[str, Any]:
    return {
        "key": image.key, "file": image.file, "captions": list(image.captions), "text": image.text,
        "class_name": None if image.label is None else str(image.label), "note": image.note,
        "licence": image.licence, "source": public_source(image.source) if image.source else None,
    }  # fmt: skip


def folder_parts(work: Work, filters: Filters, class_words: Mapping[str, str]) -> Iterator[Part]:
    """A slice is one part."""
    if work.cursor:
        return
    item = work.item
    entries = fetch(work.store, item["entries"], work.scratch / "entries.parquet", MAX_INDEX_BYTES)
    table = pq.read_table(entries, schema=_ENTRIES)
    rows = table.slice(item["begin"], SLICE_FILES).to_pylist()
    entries.unlink()
    fs, root = filesystem(item["url"])
    threads = _LOCAL_THREADS if is_local(fs) else _REMOTE_THREADS

    def read(row: Json) -> tuple[bytes, Found]:
        if row["file"] is None:
            raise ImageError("missing_file", row["note"] or "no such file")
        captions = row["captions"]
        if row["text"] is not None:
            captions = _read_text(fs, f"{root}/{row['text']}")
        if row["class_name"] in class_words and list(captions) == [words(row["class_name"])]:
            captions = [class_words[row["class_name"]]]
        source = row["source"] or public_url(f"{item['url'].rstrip('/')}/{row['file']}")
        found = Found(captions, row["class_name"], row["licence"], source, row["note"])
        return read_image_file(fs, f"{root}/{row['file']}", filters.max_image_bytes), found

    part = PartWriter(work.scratch, filters)
    for row, future in in_order(read, rows, threads=threads, ahead=2 * threads):
        key = f"{item['prefix']}/{row['key']}" if item["prefix"] else row["key"]
        try:
            part.take(key, *future.result())
        except ImageError as e:
            part.reject(key, e)
        work.advance()
    yield part.close({"done": True})


def read_image_file(fs: fsspec.AbstractFileSystem, path: str, max_bytes: int) -> bytes:
    """An image of a folder or object store.

    Raises:
        ImageError: missing, too large or unreadable.
        StorageError: storage fails for longer than the deadline.
    """
    try:
        if is_local(fs):
            return _read_local(path, max_bytes)
        return read_object(fs, path, max_bytes)
    except TooLarge as e:
        raise ImageError("too_large", str(e)) from None
    except FileNotFoundError:
        raise ImageError("missing_file", "no such file") from None
    except UserError:
        raise ImageError("access_denied", "storage refuses to show it") from None


def _read_local(path: str, max_bytes: int) -> bytes:
    try:
        # A pipe would be waited for otherwise.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise ImageError("unreadable_file", "no plain file")
            data = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        raise ImageError("unreadable_file", getattr(e, "strerror", None) or "not a path") from None
    if len(data) > max_bytes:
        raise TooLarge(f"more than {max_bytes} bytes")
    return data


def _read_text(fs: fsspec.AbstractFileSystem, path: str) -> tuple[str, ...]:
    try:
        return clean(read_image_file(fs, path, _MAX_TEXT_BYTES).decode("utf-8").splitlines())
    except UnicodeDecodeError:
        raise ImageError("no_caption", "its .txt is not UTF-8") from None


def read_notices(url: str, names: list[str], target: Path) -> Path:
    """Licence files that lie at the top of a source, as one file of JSON: name to text."""
    fs, root = filesystem(url)
    texts = {}
    for name in names:
        try:
            texts[name] = read_image_file(fs, f"{root.rstrip('/')}/{name}", MAX_NOTICE_BYTES).decode("utf-8", "replace")
        except ImageError as e:
            raise UserError(f"{url}/{name}: the licence file cannot be read ({e.detail}); mend or remove it") from None
    target.write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
    return target
