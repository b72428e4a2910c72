"""Parts of WebDataset tars."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.images import ImageError
from data.ingest.examine import Filters, Found, PartWriter
from data.ingest.ranges import RangeReader, TooLarge, filesystem, read_object
from data.ingest.tars import TarSample, read_samples
from data.source import clean, first_text, words
from data.stages.receipts import part_receipts
from data.stages.runner import PART_SAMPLES, Part, Work
from data.stages.samples import MAX_INDEX_BYTES, fetch, read_index
from data.stages.spared import spared
from data.stages.store import Json
from trainer.errors import UserError
from trainer.urls import public_source, public_url

PART_BYTES = 1 << 30
"""Of images, after which a part ends early: it lies on the worker's disk until it is published."""
_MAX_STATS_BYTES = 16 << 20
_CAPTIONS, _LICENCE, _SOURCE = ("caption", "captions", "text"), ("licence", "license"), ("url", "source")


def tar_parts(work: Work, filters: Filters, class_words: Mapping[str, str]) -> Iterator[Part]:
    """Of each tar of the item its own. The cursor is the tar's number in the item and the offset of its next sample: who goes
    on begins to read there.

    Raises:
        Exception: one of the tars is none, or cannot be read, or not now. The others are done first (see `spared`).
    """
    earlier = part_receipts(work.store, "ingest", work.item["name"])[: work.part]

    def parts(number: int, tar: Json) -> Iterator[Part]:
        own = [receipt for receipt in earlier if receipt["cursor"]["tar"] == number]
        return _parts_of_tar(work, tar, number, own, filters, class_words)

    return spared((parts(number, tar) for number, tar in enumerate(work.item["tars"])), "tars")


def tars_left(item: Json, receipts: Sequence[Json]) -> dict[str, int]:
    """Of an item that is not done to its end."""
    return {"tars": len(item["tars"]) - sum(receipt["cursor"]["done"] for receipt in receipts)}


def _parts_of_tar(
    work: Work, item: Json, number: int, earlier: list[Json], filters: Filters, class_words: Mapping[str, str]
) -> Iterator[Part]:
    """
    Args:
        item: the tar, as it was listed.
        earlier: receipts of its parts.
    """
    cursor = earlier[-1]["cursor"] if earlier else {"offset": 0, "done": False}
    if cursor["done"]:
        return
    num_read = sum(receipt["counts"].get("read", 0) for receipt in earlier)
    keys = _kept_keys(work, earlier)
    tar = RangeReader(item["url"], num_bytes=item["bytes"])
    part, offset = PartWriter(work.scratch, filters), cursor["offset"]
    for sample in read_samples(tar, offset, max_image_bytes=filters.max_image_bytes):
        if part.read >= PART_SAMPLES or part.num_bytes >= PART_BYTES:
            yield part.close({"tar": number, "offset": offset, "done": False})
            part = PartWriter(work.scratch, filters)
        _take(part, sample, item, keys, class_words)
        num_read, offset = num_read + 1, sample.next
        work.advance()
    try:
        missing = _promised(item) - num_read
    except Exception:  # of whatever kind: it costs nothing that has been read
        if part.read:
            yield part.close({"tar": number, "offset": tar.size, "done": False})
        raise
    if missing > 0:
        name = item["stats"].rpartition("/")[2]
        part.reject(item["prefix"], ImageError("missing_from_tar", f"{name} promises {missing} more"), samples=missing)
    # Also where there is nothing to say: what has no such part is not done.
    yield part.close({"tar": number, "offset": tar.size, "done": True})


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
    told = first_text(about, _SOURCE, 4096)
    source = public_source(told) if told else public_url(item["url"])
    return Found(
        captions, class_name, first_text(about, _LICENCE), source, note or "neither .txt nor .json"
    )  # fmt: skip


def _captions(about: dict[str, Any]) -> tuple[str, ...]:
    for name in _CAPTIONS:
        value = about.get(name)
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list) and all(isinstance(text, str) for text in texts) and (found := clean(texts)):
            return found
    return ()


def _promised(item: Json) -> int:
    """Samples that img2dataset says it has put into the tar; 0 where it says nothing.

    Raises:
        UserError: what says it has gone, is too large, or access is denied.
        StorageError: storage fails for longer than the deadline.
    """
    if "stats" not in item:
        return 0
    try:
        data = read_object(*filesystem(item["stats"]), _MAX_STATS_BYTES)
    except FileNotFoundError:
        raise UserError(f"{item['stats']}: has gone since it was listed; put it back") from None
    except TooLarge as e:
        raise UserError(
            f"{item['stats']}: {e}; is it img2dataset's? rename it, and begin anew in another folder"
        ) from None
    try:
        stats = json.loads(data)
    except (ValueError, RecursionError):
        return 0
    promised = stats.get("successes") if isinstance(stats, dict) else None
    return promised if isinstance(promised, int) and promised < 1 << 40 else 0
