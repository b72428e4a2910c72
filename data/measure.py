"""Statistics of what is there already: of a dataset, from what its build has counted or from some of its samples; of a
stage's output, from its receipts and some of its indexes."""

import io
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from data import draws
from data.images import ImageError, image_format
from data.provenance import read_record
from data.reader import Dataset, open_dataset
from data.stages.samples import samples_of, shard_rows
from data.stages.store import SUMMARY, StageStore, read_stage
from data.stats import MAX_STATS_BYTES, STATS, Statistics, parse_statistics
from data.storage import Storage

_ORIENTATION = 0x0112
_SHARDS_OF_SAMPLE = 8
"""Of a remote dataset: they are fetched whole."""


@dataclass
class Measured:
    """What `loupe data stats` tells."""

    url: str
    kind: str
    """`dataset`, or the stage's name."""
    facts: dict[str, Any]
    stats: Statistics | None = None
    buckets: list[tuple[str, int, int]] = field(default_factory=list)
    """(name, samples, shards)."""
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    """Of a stage, by pass."""

    def tree(self) -> dict[str, Any]:
        """As JSON has it."""
        tree: dict[str, Any] = {"url": self.url, "kind": self.kind, **self.facts}
        if self.buckets:
            tree["buckets"] = [{"name": n, "samples": samples, "shards": shards} for n, samples, shards in self.buckets]
        if self.counts:
            tree["counts"] = self.counts
        if self.stats:
            tree["statistics"] = self.stats.model_dump(mode="json")
        return tree


def measure_dataset(url: str, *, sample: int, cache_dir: str | None = None, seed: int = 0) -> Measured:
    """
    Args:
        sample: images to look at where the dataset brings no statistics.

    Raises:
        UserError: it cannot be opened, or a shard is damaged.
        StorageError: remote storage does not answer.
    """
    dataset = open_dataset(url, name=url, cache_dir=cache_dir)
    info = dataset.info
    buckets = [
        (b.name, int(dataset.shards.num_samples[b.first_shard : b.first_shard + b.num_shards].sum()), b.num_shards)
        for b in info.buckets
    ]
    facts = {
        "name": info.name,
        "samples": info.num_samples,
        "shards": len(dataset.shards),
        "bytes": int(dataset.shards.num_bytes.sum()),
        "digest": dataset.digest,
        "classes": len(info.class_names or ()),
        "caption_kinds": list(info.caption_kinds),
        "licences": info.licences,
        "columns": list(info.columns),
        "rejected": info.rejected,
    }
    stats = _stored(url, info.num_samples) or _of_some(dataset, sample, seed)
    return Measured(url, "dataset", facts, stats, buckets)


def _stored(url: str, num_samples: int) -> Statistics | None:
    """What the build has counted, if it was of as many samples as there are now."""
    storage = Storage(url)
    try:
        data = storage.read(STATS, max_bytes=MAX_STATS_BYTES)
    except FileNotFoundError:
        return None
    stats = parse_statistics(data, source=f"{storage.url}/{STATS}")
    return stats if stats.samples == num_samples else None


def _of_some(dataset: Dataset, sample: int, seed: int) -> Statistics:
    """Of samples drawn from the whole dataset where it lies here, else from a few of its shards."""
    ends = dataset.shard_sizes.cumsum()
    if dataset.is_local or dataset.num_samples <= sample:
        rows = draws.raw(seed, "stats", count=sample) % dataset.num_samples
        chosen = (
            sorted({int(row) for row in rows}) if dataset.num_samples > sample else list(range(dataset.num_samples))
        )
    else:
        shards = draws.permutation(seed, "stats", length=len(dataset.shards))[:_SHARDS_OF_SAMPLE]
        each = -(-sample // len(shards))
        chosen = [
            row
            for shard in sorted(shards.tolist())
            for row in range(int(ends[shard] - dataset.shard_sizes[shard]), int(ends[shard]))[:each]
        ]
    stats, names = Statistics(), dataset.class_names
    for row in chosen:
        found = dataset.read(row)
        try:
            width, height = image_size(found.image)
        except ImageError:  # counted by `verify`
            continue
        stats.add(
            key=found.key, width=width, height=height, num_bytes=len(found.image), kind=image_format(found.image),
            captions=found.captions, class_name=names[found.label] if names and 0 <= found.label < len(names) else None,
        )  # fmt: skip
    if len(chosen) < dataset.num_samples:
        stats.of = dataset.num_samples
    return stats


def measure_stage(url: str, *, shards: int, seed: int = 0) -> Measured:
    """
    Args:
        shards: indexes to read, drawn from all; of a stage that writes samples.

    Raises:
        UserError: no stage's output, or a file of it is damaged.
        StorageError: storage does not answer.
    """
    store = StageStore(url)
    stage, record = read_stage(store), read_record(url)
    finished = store.exists(SUMMARY)
    facts = {"finished": finished, **record.facts, "settings": dict(record.settings)}
    if isinstance(command := stage.get("command"), str):
        facts["command"] = command
    measured = Measured(url, str(stage["stage"]), facts, counts={n: dict(c) for n, c in record.counts.items()})
    if not finished or stage["stage"] not in ("ingest", "faces"):
        return measured
    samples = samples_of(store, stage)
    names = [shard.name for shard in samples.each_shard()]
    facts["shards"] = len(names)
    chosen = sorted(draws.permutation(seed, "stats", length=len(names))[:shards].tolist())
    stats = Statistics()
    with TemporaryDirectory(prefix="loupe-stats-") as scratch:
        for i in chosen:
            for row in shard_rows(samples, samples.shard(names[i]), Path(scratch)):
                stats.add(
                    key=row.key, width=row.width, height=row.height, num_bytes=row.size, kind=row.format,
                    captions=row.captions, licence=row.licence, class_name=row.class_name,
                )  # fmt: skip
    if len(chosen) < len(names):
        stats.of = round(stats.samples / len(chosen) * len(names))
    measured.stats = stats
    return measured


def image_size(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright image, without decoding it.

    Raises:
        ImageError: no image that we read.
    """
    kind = image_format(data)
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise ImageError("undecodable", f"{kind}: {e}") from None
    return (height, width) if turned else (width, height)
