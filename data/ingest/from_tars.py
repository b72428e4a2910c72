"""Parts of a WebDataset tar."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data.images import ImageError
from data.ingest.examine import Filters, Found, PartWriter
from data.ingest.fetch import public_url
from data.ingest.ranges import RangeReader, filesystem, read_object
from data.ingest.tars import TarSample, read_samples
from data.source import clean, first_text, words
from data.stages.runner import PART_SAMPLES, Part, Work, part_receipts
from data.stages.samples import MAX_INDEX_BYTES, fetch, read_index
from data.stages.store import Json

PART_BYTES = 1 << 30
"""Of images, after which a part ends early: it lies on the worker's disk until it is published."""
_MAX_STATS_BYTES = 16 << 20
_CAPTIONS, _LICENCE, _SOURCE = ("caption", "captions", "text"), ("licence", "license"), ("url", "source")


def tar_parts(work: Work, filters: Filters, class_words: Mapping[str, str]) -> Iterator[Part]:
    """The cursor is the offset of the next sample: who goes on begins to read there."""
    item = work.item
    cursor = work.cursor or {"offset": 0, "done": False}
    if cursor["done"]:
        return
    earlier = part_receipts(work.store, "ingest", item["name"])[: work.part]
    num_read = sum(receipt["counts"].get("read", 0) for receipt in earlier)
    keys = _kept_keys(work, earlier)
    tar = RangeReader(item["url"], num_bytes=item["bytes"])
    part = PartWriter(work.scratch, filters)
    for sample in read_samples(tar, cursor["offset"], max_image_bytes=filters.max_image_bytes):
        _take(part, sample, item, keys, class_words)
        num_read += 1
        work.advance()
        if part.read >= PART_SAMPLES or part.num_bytes >= PART_BYTES:
            yield part.close({"offset": sample.next, "done": False})
            part = PartWriter(work.scratch, filters)
    if (missing := _promised(item) - num_read) > 0:
        name = item["stats"].rpartition("/")[2]
        part.reject(item["prefix"], ImageError("missing_from_tar", f"{name} promises {missing} more"), samples=missing)
    if part.read:
        yield part.close({"offset": tar.size, "done": True})


def _kept_keys(work: Work, receipts: list[Json]) -> set[str]:
    keys: set[str] = set()
    for receipt in receipts:
        if "index" in receipt["files"]:
            index = fetch(work.store, receipt["files"]["index"], work.scratch / "earlier.parquet", MAX_INDEX_BYTES)
            keys |= {row.key for row in read_index(index)}
            index.unlink()
    return keys


def _take(part: PartWriter, sample: TarSample, item: Json, keys: set[str], class_words: Mapping[str, str]) -> None:
    key = f"{item['prefix']}/{sample.key}"
    if sample.problem is not None:
        part.reject(key, sample.problem)
        return
    image = sample.image()
    if image is None:
        part.reject(key, ImageError("no_image", f"only {', '.join(sample.fields)}"))
    elif key in keys:
        part.reject(key, ImageError("repeated_key", "the tar has it twice; the first is kept"))
    elif part.take(key, image, _found(sample, item, class_words)):
        keys.add(key)


def _found(sample: TarSample, item: Json, class_words: Mapping[str, str]) -> Found:
    note = ""
    try:
        about = json.loads(sample.fields.get("json", b"{}"))
    except (ValueError, RecursionError):
        about, note = {}, "no .txt, and the .json is damaged"
    if not isinstance(about, dict):
        about = {}
    captions: tuple[str, ...] = ()
    if "txt" in sample.fields:
        try:
            captions = clean([sample.fields["txt"].decode("utf-8")])
        except UnicodeDecodeError:
            note = "the .txt is not UTF-8"
    class_name = first_text({"cls": sample.fields.get("cls", b"").decode("utf-8", "replace")}, ("cls",), 100)
    captions = captions or _captions(about)
    if not captions and class_name is not None:
        captions = (class_words.get(class_name, words(class_name)),)
    source = first_text(about, _SOURCE, 4096)
    return Found(
        captions, class_name, first_text(about, _LICENCE), public_url(source or item["url"]), note or "neither .txt nor .json"
    )  # fmt: skip


def _captions(about: dict[str, Any]) -> tuple[str, ...]:
    for name in _CAPTIONS:
        value = about.get(name)
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts) and (found := clean(texts)):
            return found
    return ()


def _promised(item: Json) -> int:
    """Samples that img2dataset says it has put into the tar; 0 where it says nothing."""
    if "stats" not in item:
        return 0
    try:
        stats = json.loads(read_object(*filesystem(item["stats"]), _MAX_STATS_BYTES))
    except (ValueError, RecursionError):
        return 0
    promised = stats.get("successes") if isinstance(stats, dict) else None
    return promised if isinstance(promised, int) and promised < 1 << 40 else 0
