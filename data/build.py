"""Build a dataset from a folder of images in one process: read, shrink if asked, write MDS shards, publish.

A folder becomes a dataset by one rename when all of it is on disk, so a killed build leaves nothing that looks whole.
To a URL the shards go first and `dataset.json`, without which nobody opens it, last. What the stages before it have written is
built by data.mdsbuild, with as many workers as one likes.
"""

import heapq
import json
import shutil
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from data.ahead import in_order
from data.buckets import nearest
from data.card import GRID_COLUMNS, GRID_ROWS, Card, grid
from data.images import ImageError, encode_image, image_format, read_image
from data.mds import mds
from data.provenance import Record
from data.publish import check_free, check_writable, publish, temporary_folder
from data.schema import (
    COLUMNS,
    DATASET,
    HASH,
    INDEX,
    LABELS,
    MAX_SHARD_BYTES,
    ORIGINAL,
    REJECTED,
    Bucket,
    DatasetInfo,
    Resize,
    Shard,
    index_digest,
    parse_index,
)
from data.source import Entry, Source
from data.stats import STATS, Statistics
from data.storage import Storage
from data.transforms import shrink_short_side
from trainer.errors import UserError

_SHARD_OVERHEAD_BYTES = 1 << 12
"""More than the head of a shard and of a sample take."""


@dataclass
class Built:
    """What a build did."""

    info: DatasetInfo
    num_shards: int
    num_bytes: int
    rejected: list["Rejected"] = field(default_factory=list)
    bucket_samples: Mapping[str, int] = field(default_factory=dict)
    card: Sequence[str] = ()
    """Names of its files."""

    def told(self) -> dict[str, Any]:
        """As the last pass of a build by stages notes it."""
        return {
            "samples": self.info.num_samples,
            "shards": self.num_shards,
            "bytes": self.num_bytes,
            "digest": self.info.digest,
            "buckets": [
                {"name": bucket.name, "samples": self.bucket_samples[bucket.name], "num_shards": bucket.num_shards}
                for bucket in self.info.buckets
            ],
            "files": self.card,
        }


@dataclass(frozen=True)
class Rejected:
    file_name: str
    reason: str
    detail: str


def build(
    source: Source,
    out: str,
    *,
    name: str,
    resize: Resize,
    shard_mib: int = 64,
    max_samples: int | None = None,
    order_seed: int | None = None,
    aspects: Mapping[str, float] | None = None,
    overwrite: bool = False,
    threads: int = 1,
    progress: Callable[[], None] = lambda: None,
) -> Built:
    """Write the images of `source` as a dataset at `out`, a folder or an fsspec URL.

    Args:
        resize: what to do to the images; by default nothing, the files' bytes are kept.
        max_samples: stop after so many.
        order_seed: put the images in an order drawn from it; absent: the source's.
        aspects: sort images into buckets of these shapes, width / height by name; absent or empty: not.
        overwrite: replace a dataset that is there.
        threads: that read, decode and shrink images; what comes out is the same.
        progress: called after each image.

    Raises:
        UserError: `out` is taken or cannot be written, or no image is usable.
        StorageError: remote storage fails.
    """
    storage = check_build(source, out, shard_mib, overwrite)
    check_writable(storage)
    with temporary_folder(storage) as folder:
        rejected: list[Rejected] = []
        tally = _Tally(source.class_names, aspects or {})
        samples = tally.counted(
            _samples(source.ordered(order_seed), resize, shard_mib << 20, rejected, progress, threads)
        )
        if aspects:
            buckets = _write_buckets(folder, samples, shard_mib << 20, max_samples, aspects)
        else:
            buckets = ()
            _write_shards(folder, samples, shard_mib << 20, max_samples)
        if not tally.stats.samples:
            why = f"all {len(rejected)} rejected, the first as {rejected[0].reason}" if rejected else "none"
            raise UserError(f"{source.folder}: no usable image ({why}); see `loupe data build --help` for the layouts")
        index = (folder / INDEX).read_bytes()
        labels = tally.all_labels([bucket.name for bucket in buckets])
        info = DatasetInfo(
            name=name,
            num_samples=tally.stats.samples,
            index_digest=index_digest(index),
            resize=resize,
            order_seed=order_seed,
            class_names=source.class_names,
            notice=_copy_notices(source, folder),
            rejected=dict(sorted(Counter(r.reason for r in rejected).items())),
            merged_rows=source.merged_rows,
            buckets=buckets,
            labels=LABELS if labels is not None else None,
            labels_xxh64=xxhash.xxh64(labels.tobytes()).hexdigest() if labels is not None else None,
            licences=tally.stats.known_licences,
        )
        if labels is not None:
            (folder / LABELS).write_bytes(labels.tobytes())
        if rejected:
            lines = (json.dumps(vars(r), ensure_ascii=False) + "\n" for r in rejected)
            (folder / REJECTED).write_text("".join(lines), encoding="utf-8")
        (folder / STATS).write_text(tally.stats.model_dump_json(indent=1) + "\n", encoding="utf-8")
        shards = parse_index(index, source=INDEX)
        card = _card(source, info, tally, shards).files()
        for file, content in card.items():
            (folder / file).write_bytes(content)
        (folder / DATASET).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        publish(folder, storage, overwrite)
    samples_of = {bucket.name: tally.samples_of(bucket.name) for bucket in buckets}
    return Built(info, len(shards), num_bytes, rejected, samples_of, sorted(card))


def check_build(source: Source, out: str, shard_mib: int, overwrite: bool) -> Storage:
    """The place to build at; nothing is written.

    Raises:
        UserError: `out` is taken, or a shard cannot be of this size.
    """
    if not 0 < shard_mib << 20 <= MAX_SHARD_BYTES - _SHARD_OVERHEAD_BYTES:
        raise UserError(f"--shard-mib: {shard_mib} is not between 1 and 4095")
    storage = Storage(out)
    for images in (source.folder, *source.more_folders):
        check_free(storage, images, overwrite)
    return storage


class _Tally:
    """What is counted of samples on their way into shards."""

    def __init__(self, class_names: Sequence[str] | None, aspects: Mapping[str, float]) -> None:
        self.stats = Statistics()
        self._class_names, self._aspects = class_names, aspects
        self._labels: dict[str, array[int]] = {}
        """By bucket, in order."""
        self._shown: list[tuple[int, str, bytes]] = []
        """(minus the hash of the key, key, image) of those with the smallest hashes, as a heap."""

    def counted(self, samples: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each with its bucket."""
        for sample in samples:
            label, (height, width) = sample["label"], sample["shape"]
            sample["bucket"] = nearest(width, height, self._aspects) if self._aspects else ""
            self._labels.setdefault(sample["bucket"], array("i")).append(label)
            self.stats.add(
                key=sample["key"], width=width, height=height, num_bytes=len(sample["image"]), kind=sample["kind"],
                captions={ORIGINAL: sample["captions"]}, licence=sample["licence"],
                class_name=self._class_names[label] if self._class_names and label >= 0 else None,
            )  # fmt: skip
            place = (-xxhash.xxh3_64_intdigest(sample["key"]), sample["key"], sample["image"])
            (heapq.heappush if len(self._shown) < GRID_COLUMNS * GRID_ROWS else heapq.heappushpop)(self._shown, place)
            yield sample

    def all_labels(self, buckets: Sequence[str]) -> NDArray[np.int32] | None:
        """Little-endian, by row; None where no sample has one."""
        parts = [np.array(self._labels[bucket], dtype="<i4") for bucket in buckets or [""]]
        labels = np.concatenate(parts)
        return labels if (labels >= 0).any() else None

    def samples_of(self, bucket: str) -> int:
        return len(self._labels[bucket])

    def shown(self) -> list[bytes]:
        return [image for _, _, image in sorted(self._shown, reverse=True)]


def _card(source: Source, info: DatasetInfo, tally: _Tally, shards: Sequence[Shard]) -> Card:
    how = {"layout": source.layout, **info.resize.model_dump(exclude_none=True)}
    counts = {"read": len(source.entries), "kept": info.num_samples}
    return Card(
        info, tally.stats, len(shards), sum(shard.num_bytes for shard in shards),
        bucket_samples=[(bucket.name, tally.samples_of(bucket.name)) for bucket in info.buckets],
        records=[Record("build", how, {"images": counts})], notices=[name for name, _ in _notices(source)],
        grid=grid(tally.shown()),
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- samples


def _samples(
    entries: Iterable[Entry],
    resize: Resize,
    shard_bytes: int,
    rejected: list[Rejected],
    progress: Callable[[], None],
    threads: int,
) -> Iterator[dict[str, Any]]:
    for entry, made in in_order(lambda entry: _sample(entry, resize), entries, threads=threads, ahead=2 * threads):
        try:
            sample = made.result()
            num_bytes = len(sample["image"]) + len(json.dumps(entry.captions)) + len(entry.key.encode())
            if num_bytes + _SHARD_OVERHEAD_BYTES > shard_bytes:  # MDSWriter would write an empty shard before it
                raise ImageError("larger_than_a_shard", f"{num_bytes} bytes")
            yield sample
        except ImageError as e:
            rejected.append(Rejected(entry.key, e.reason, e.detail))
        progress()


def _sample(entry: Entry, resize: Resize) -> dict[str, Any]:
    """A row of the dataset. Every image is decoded once, so that what the dataset holds can be decoded.

    Raises:
        ImageError: it cannot be used.
    """
    if not entry.captions:
        raise ImageError("no_caption", entry.note or "its row has neither text nor captions")
    if entry.path is None:
        raise ImageError("missing_file", entry.note or "no such file")
    try:
        data = entry.path.read_bytes()
    except OSError as e:
        raise ImageError("unreadable_file", e.strerror or str(e)) from None
    pixels_HWC = read_image(data)
    kind = image_format(data)
    target = kind if resize.format == "keep" else resize.format
    shrunk_HWC = shrink_short_side(pixels_HWC, resize.short_side) if resize.short_side else pixels_HWC
    if shrunk_HWC is not pixels_HWC or target != kind:
        data = encode_image(shrunk_HWC, target, resize.quality or 90)
    return {
        "key": entry.key, "image": data, "captions": list(entry.captions), "label": entry.label,
        # No columns: these are counted, and decide the bucket.
        "shape": shrunk_HWC.shape[:2], "kind": target, "licence": entry.licence,
    }  # fmt: skip


def _write_shards(folder: Path, samples: Iterator[dict[str, Any]], shard_bytes: int, max_samples: int | None) -> int:
    """Shards and index.json into `folder`; returns the number of samples."""
    writer = _writer(folder, shard_bytes)
    count = 0
    try:
        for sample in samples:
            writer.write(sample)
            count += 1
            if count == max_samples:
                break
    except BaseException:
        writer.cancel_future_jobs()
        raise
    writer.finish()
    return count


def _write_buckets(
    folder: Path,
    samples: Iterator[dict[str, Any]],
    shard_bytes: int,
    max_samples: int | None,
    aspects: Mapping[str, float],
) -> tuple[Bucket, ...]:
    """As `_write_shards`, with a writer for each bucket that has images; their shards follow one another."""
    writers: dict[str, Any] = {}
    count = 0
    try:
        for sample in samples:
            bucket = sample["bucket"]
            if bucket not in writers:
                writers[bucket] = _writer(folder / f"bucket{len(writers)}", shard_bytes)
            writers[bucket].write(sample)
            count += 1
            if count == max_samples:
                break
    except BaseException:
        for writer in writers.values():
            writer.cancel_future_jobs()
        raise
    entries: list[dict[str, Any]] = []
    buckets: list[Bucket] = []
    for name, aspect in aspects.items():
        if name not in writers:
            continue
        writer = writers[name]
        writer.finish()
        buckets.append(Bucket(name=name, aspect=aspect, first_shard=len(entries), num_shards=len(writer.shards)))
        for entry in writer.shards:
            final = f"shard.{len(entries):05d}.mds"
            (Path(writer.local) / entry["raw_data"]["basename"]).rename(folder / final)
            entries.append({**entry, "raw_data": {**entry["raw_data"], "basename": final}})
        shutil.rmtree(writer.local)
    (folder / INDEX).write_text(json.dumps({"version": 2, "shards": entries}, sort_keys=True))
    return tuple(buckets)


def _writer(folder: Path, shard_bytes: int) -> Any:
    # Not used as a context manager: on an error that would still write the index of what there is.
    return mds().Writer(columns=COLUMNS, out=str(folder), hashes=[HASH], size_limit=shard_bytes)


def _copy_notices(source: Source, folder: Path) -> str | None:
    """The source's licence files, as they are and as one text."""
    texts = []
    for name, path in _notices(source):
        shutil.copyfile(path, folder / name)
        texts.append(path.read_text(encoding="utf-8", errors="replace").strip())
    return "\n\n".join(texts) or None


def _notices(source: Source) -> list[tuple[str, Path]]:
    """By the names that they get."""
    return [(f"{p.parent.name}-{p.name}" if source.more_folders else p.name, p) for p in source.notices()]
