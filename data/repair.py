"""What can be done about damaged shards: fetch good copies from a mirror, or set them aside and go on without.

A shard is replaced by one of the same hash only, so repairs never change a dataset. Setting aside does: the rest is another
dataset, with another digest, and runs on the old one do not resume on it.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from data.publish import put_bytes, put_whole
from data.reader import open_dataset
from data.schema import DATASET, INDEX, LABELS, MAX_DATASET_BYTES, MAX_INDEX_BYTES, Bucket, index_digest, parse_index
from data.storage import DEADLINE_S, DamagedShard, Storage
from data.verify import Report
from data.verify_shard import fetch_shard
from data.wds import is_tar_index
from trainer.errors import UserError

QUARANTINE = "quarantine"
"""Folder of what was set aside, and of the index and description before."""


@dataclass
class Repaired:
    shards: list[str]
    failures: list[str]
    """What could not be."""
    labels: bool = False


def repair(url: str, report: Report, mirror_url: str | None) -> Repaired:
    """Bring good copies of what `report` calls damaged; the file of labels is made again of the shards where it can be.

    Args:
        mirror_url: a copy of the dataset, or another folder with its shards; absent: the labels only.

    Raises:
        UserError: the dataset cannot be opened or written.
        StorageError: storage does not answer.
    """
    dataset = open_dataset(url, name=url)
    storage = Storage(url)
    done = Repaired([], [])
    with tempfile.TemporaryDirectory(prefix="loupe-repair-") as folder:
        if mirror_url is not None:
            mirror = Storage(mirror_url)
            if mirror.url == storage.url:
                raise UserError(f"--repair: {mirror_url} is the dataset itself; name a copy of it")
            for number in report.damaged:
                shard = dataset.shards[number]
                file = Path(folder) / f"shard{number}"
                try:
                    fetch_shard(mirror, shard, file)
                except FileNotFoundError:
                    done.failures.append(f"{mirror.url}/{shard.name}: is not there")
                except DamagedShard as e:
                    done.failures.append(str(e))
                else:
                    put_whole(storage, file, shard.name)
                    file.unlink()
                    done.shards.append(shard.name)
        if any(failure.labels for failure in report.failures):
            made = None if report.labels is None or report.damaged else report.labels.astype("<i4").tobytes()
            if made is not None and xxhash.xxh64(made).hexdigest() == dataset.info.labels_xxh64:
                put_bytes(storage, made, dataset.info.labels or LABELS)
                done.labels = True
            else:
                done.failures.append(f"{storage.url}/{dataset.info.labels}: cannot be made of the shards; build again")
    return done


def quarantine(url: str, damaged: Sequence[int]) -> str:
    """Take damaged shards out of a dataset and into its folder `quarantine`; returns the new digest.

    The index and description before stay in that folder, named by their digest.

    Raises:
        UserError: the dataset cannot be opened or written, or nothing would be left.
        StorageError: storage does not answer.
    """
    dataset = open_dataset(url, name=url)
    storage = Storage(url)
    info, gone = dataset.info, set(damaged)
    kept = [number for number in range(len(dataset.shards)) if number not in gone]
    num_samples = int(dataset.shards.num_samples[kept].sum())
    if not num_samples:
        raise UserError(f"{url}: every shard is damaged, so nothing would be left; build the dataset again")
    index_before = storage.read(INDEX, max_bytes=MAX_INDEX_BYTES)
    if is_tar_index(index_before):
        raise UserError(f"{url}: is an index of tars; mend or remove the tar, then run `loupe data index` again")
    entries = json.loads(index_before)["shards"]
    index = json.dumps({"version": 2, "shards": [entries[number] for number in kept]}, sort_keys=True).encode()
    parse_index(index, source=INDEX)
    changed = {
        "num_samples": num_samples,
        "index_digest": index_digest(index),
        "buckets": _buckets_without(info.buckets, gone),
        "rejected": {
            **info.rejected,
            "quarantined": info.rejected.get("quarantined", 0) + info.num_samples - num_samples,
        },
    }
    labels = None
    if info.labels:
        starts = np.concatenate([[0], np.cumsum(dataset.shards.num_samples)])
        every = dataset.read_labels()
        labels = np.concatenate([every[starts[n] : starts[n + 1]] for n in kept]).astype("<i4").tobytes()
        changed["labels_xxh64"] = xxhash.xxh64(labels).hexdigest()
    after = info.model_copy(update=changed)
    description = storage.read(DATASET, max_bytes=MAX_DATASET_BYTES)
    put_bytes(storage, index_before, f"{QUARANTINE}/{dataset.digest}.{INDEX}")
    put_bytes(storage, description, f"{QUARANTINE}/{dataset.digest}.{DATASET}")
    # From here on nobody opens it, until it is written again.
    storage.delete(DATASET)
    if labels is not None:
        put_bytes(storage, labels, info.labels or LABELS)
    put_bytes(storage, index, INDEX)
    put_bytes(storage, after.model_dump_json(indent=1).encode() + b"\n", DATASET)
    for number in sorted(gone):
        set_aside(storage, dataset.shards[number].name)
    return after.digest


def _buckets_without(buckets: Sequence[Bucket], gone: set[int]) -> tuple[Bucket, ...]:
    """A bucket that loses all of its shards goes."""
    left: list[Bucket] = []
    first = 0
    for bucket in buckets:
        shards = range(bucket.first_shard, bucket.first_shard + bucket.num_shards)
        count = len(set(shards) - gone)
        if count:
            left.append(bucket.model_copy(update={"first_shard": first, "num_shards": count}))
        first += count
    return tuple(left)


def set_aside(storage: Storage, name: str, *, deadline_s: float = DEADLINE_S) -> bool:
    """Move a file to the quarantine; False: it is not there, since that is its damage or it was moved before.

    Raises:
        UserError: access is denied.
        StorageError: storage fails for longer than the deadline.
    """
    target = f"{QUARANTINE}/{name}"

    def move() -> bool:
        storage.fs.invalidate_cache()
        if storage.is_local:
            Path(storage.path(target)).parent.mkdir(parents=True, exist_ok=True)
        try:
            storage.fs.mv(storage.path(name), storage.path(target))
        except FileNotFoundError:
            return False
        return True

    return storage.ask(move, name, deadline_s, "moved")
