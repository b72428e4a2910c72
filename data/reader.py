"""Datasets opened by their URL, before anything of a shard is read."""

from data.cache import CacheSettings, ShardCache
from data.counts import Counts
from data.dataset import Dataset, Fetch
from data.images import ImageError, read_image
from data.mds import mds
from data.schema import (
    COLUMNS,
    DATASET,
    INDEX,
    MAX_DATASET_BYTES,
    MAX_INDEX_BYTES,
    Sample,
    Shard,
    index_digest,
    parse_dataset,
    parse_index,
)
from data.shards import of_mds
from data.storage import DEADLINE_S, BadShard, Storage, StorageError
from data.wds import index_folder, is_tar_index, parse_tar_index
from trainer.errors import UserError

__all__ = [
    "BadShard",
    "Dataset",
    "ImageError",
    "StorageError",
    "cache_note",
    "open_dataset",
    "read_image",
    "readable",
]


def open_dataset(
    url: str,
    *,
    name: str,
    max_samples: int | None = None,
    cache_dir: str | None = None,
    cache_gib: float | None = None,
    fetch: Fetch = "shards",
    deadline_s: float = DEADLINE_S,
) -> Dataset:
    """Open a dataset that `loupe data build` has written, or tars that `loupe data index` has. Reads the two small files,
    no shard.

    Args:
        url: folder or any fsspec URL; of indexed tars also a single tar.
        name: what the run's config calls it; prefixes keys and errors.
        max_samples: use the first so many.
        cache_dir: for shards of remote datasets and marks of verified ones; the system's cache folder when absent.
        cache_gib: what all shards there may take; 80 % of the free disk when absent.
        fetch: remote shards as wholes, or samples one by one: for few of them, whose shards' hashes are not checked then.
        deadline_s: longest time for one shard, all attempts together.

    Raises:
        UserError: missing, empty, not MDS, of another schema, or unsafe to read.
        StorageError: remote storage does not answer.
    """
    storage = Storage(index_folder(url))
    try:
        index = storage.read(INDEX, max_bytes=MAX_INDEX_BYTES)
    except FileNotFoundError:
        raise UserError(f"dataset {name}: no {INDEX} in {storage.url}; build one with `loupe data build SOURCE "
                        f"{url}`, or of WebDataset tars there with `loupe data index {url}`") from None  # fmt: skip
    source = f"{storage.url}/{INDEX}"
    if is_tar_index(index):
        shards, shards_url = parse_tar_index(index, source=source, beside=url)
    else:
        parsed = parse_index(index, source=source)
        _check_encodings(parsed, source)
        shards, shards_url = of_mds(parsed), storage.url
    try:
        description = storage.read(DATASET, max_bytes=MAX_DATASET_BYTES)
    except FileNotFoundError:
        raise UserError(f"dataset {name}: {storage.url} has an {INDEX} but no {DATASET}: its upload was not finished, "
                        "or it is not in Loupe's schema; build it with `loupe data build`") from None  # fmt: skip
    info = parse_dataset(description, source=f"{storage.url}/{DATASET}")
    if info.index_digest != index_digest(index) or info.num_samples != shards.num_samples.sum():
        raise UserError(
            f"dataset {name}: {INDEX} and {DATASET} in {storage.url} are of different builds; build it again"
        )
    in_buckets = sum(bucket.num_shards for bucket in info.buckets)
    if info.buckets and in_buckets != len(shards):
        raise UserError(
            f"{storage.url}/{DATASET}: buckets: cover {in_buckets} of {len(shards)} shards; build the dataset again"
        )
    return Dataset(
        storage.url, name=name, info=info, shards=shards, max_samples=max_samples,
        cache=CacheSettings(cache_dir, cache_gib), shards_url=shards_url, fetch=fetch, deadline_s=deadline_s,
    )  # fmt: skip


def readable(dataset: Dataset, index: int) -> Sample:
    """The sample in row `index`, or the first after it whose shard can be read.

    Raises:
        BadShard: no shard can.
    """
    for _ in range(len(dataset.shards) - 1):
        try:
            return dataset.read(index)
        except BadShard:
            shard_index, row = dataset.locate(index)
            index = (index - row + int(dataset.shard_sizes[shard_index])) % dataset.num_samples
    return dataset.read(index)


def cache_note(datasets: "list[Dataset]", window_shards: int, prefetch_shards: int) -> str:
    """Where remote shards are kept, and how many bytes of them; empty where all datasets are local.

    Raises:
        UserError: the cache cannot hold what is in use at a time.
    """
    cached = [(dataset, dataset.bytes_in_use(window_shards, prefetch_shards)) for dataset in datasets]
    needed = sum(num_bytes for _, num_bytes in cached)
    if not needed:
        return ""
    cache = ShardCache(next(d for d, num_bytes in cached if num_bytes).cache_settings, Counts())
    limit, gib = cache.limit_bytes(), 1 << 30
    if needed > limit:
        raise UserError(
            f"data.cache_gib: shards of {needed / gib:.3g} GiB are in use at a time, and {cache.folder} may hold "
            f"{limit / gib:.3g}; raise it, name a larger disk by data.cache_dir, or lower data.shuffle_window_shards and "
            "data.prefetch_shards"
        )
    return (
        f"remote shards are cached in {cache.folder}: up to {limit / gib:.3g} GiB, of which at most "
        f"{needed / gib:.3g} are in use at a time"
    )


def _check_encodings(shards: tuple[Shard, ...], source: str) -> None:
    known = set(COLUMNS)
    for shard in shards:
        for column, encoding in zip(shard.entry["column_names"], shard.entry["column_encodings"], strict=True):
            if column not in known and not _is_encoding(encoding):
                raise UserError(f"{source}: column {column!r} has the unknown encoding {encoding!r}")


def _is_encoding(encoding: str) -> bool:
    try:
        return bool(mds().is_encoding(encoding))
    except (KeyError, ValueError, TypeError, AttributeError):  # how it refuses the part after a colon
        return False
