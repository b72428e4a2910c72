"""Builds the index by which WebDataset tars are trained on as they are (data.wds). Each tar is read once, front to back.

What was read of a tar is kept beside its rows, so that an index that was interrupted, or that more tars have joined, is
built from where it was.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from data.images import ImageError, image_format
from data.schema import DATASET, INDEX, LABELS, MAX_DATASET_BYTES, MAX_INDEX_BYTES, DatasetInfo, Shard, index_digest
from data.stages.store import StageStore
from data.storage import CHUNK_BYTES, DEADLINE_S, LIST_DEADLINE_S, STALL_S, Storage, with_retries
from data.tars import Member, TarStream
from data.wds import (
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    TAR_NAME,
    index_folder,
    is_tar_index,
    json_caption,
    make_tar_index,
    pack_rows,
    rows_name,
    tars_folder,
)
from trainer.errors import UserError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_READ = {"txt": MAX_CAPTION_BYTES, "json": MAX_CAPTION_BYTES, "cls": 64}
"""Members whose content decides, and how large they may be."""
_MAX_STATS_BYTES = 1 << 20
_READS_BEFORE_GIVING_UP = 3


@dataclass
class TarIndexed:
    """What was read of one tar."""

    name: str
    stamp: str
    """Changes when the tar is written."""
    num_bytes: int
    xxh64: str
    num_samples: int
    rows_bytes: int
    rows_xxh64: str
    has_labels: bool
    rejected: dict[str, int] = field(default_factory=dict)
    labels: list[int] = field(default_factory=list)
    """Of each sample, if any has one."""


@dataclass
class Indexed:
    """What an index holds."""

    url: str
    """What a run's config names."""
    info: DatasetInfo
    num_tars: int
    num_bytes: int
    num_read: int
    """Tars read now; the others were known."""
    warnings: list[str]


def index_tars(
    url: str,
    out: str | None = None,
    *,
    overwrite: bool = False,
    threads: int = 4,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Indexed:
    """Index the tars below a folder, or a single one.

    Args:
        url: a path or any fsspec URL.
        out: folder or URL for the index; beside the tars when absent.
        overwrite: replace an index that other tars have joined or left.
        progress: called with bytes done and bytes in all.

    Raises:
        UserError: no tars, a broken one, or `out` holds something else.
        StorageError: storage does not answer.
    """
    storage, store = Storage(tars_folder(url)), StageStore(out or index_folder(url))
    found, stats = _list(storage, url)
    _check_free(store)
    total, done, read = sum(size for size, _ in found.values()), 0, 0
    indexed: dict[str, TarIndexed] = {}
    with ThreadPoolExecutor(threads) as pool:
        work = {pool.submit(_known_or_read, storage, store, n, size, stamp): n for n, (size, stamp) in found.items()}
        try:
            for future in as_completed(work):
                one, was_read = future.result()
                indexed[work[future]] = one
                done, read = done + one.num_bytes, read + was_read
                progress(done, total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    tars = [indexed[name] for name in sorted(indexed)]
    info = _publish(store, tars, None if out is None else storage.url, overwrite)
    warnings = [text for tar in tars if (text := _compare(storage, tar, stats))]
    return Indexed(out or url, info, len(tars), total, read, warnings)


def _list(storage: Storage, url: str) -> tuple[dict[str, tuple[int, str]], set[str]]:
    """Tars by name with size and stamp, and the names of img2dataset's statistics."""
    single = url.rstrip("/").rpartition("/")[2] if url.rstrip("/").endswith(".tar") else None

    def look() -> dict[str, Any]:
        storage.fs.invalidate_cache()
        if single:
            return {storage.path(single): storage.fs.info(storage.path(single))}
        return dict(storage.fs.find(storage.root, detail=True))

    try:
        entries = storage.ask(look, "", LIST_DEADLINE_S, "listed")
    except FileNotFoundError:
        entries = {}
    root = storage.root.lstrip("/")
    found: dict[str, tuple[int, str]] = {}
    stats = set()
    for path, info in entries.items():
        name = path.lstrip("/").removeprefix(root).lstrip("/")
        if name.endswith("_stats.json"):
            stats.add(name)
        if name.endswith((".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz")):
            raise UserError(f"{storage.url}/{name}: is compressed, and cannot be read at random; unpack it to a .tar")
        if not name.endswith(".tar"):
            continue
        if not TAR_NAME.fullmatch(name):
            raise UserError(f"{storage.url}/{name}: rename it; letters, digits and . _ = - may stand in a tar's name")
        stamp = next(
            (str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), ""
        )
        found[name] = (int(info["size"]), stamp)
    if not found:
        raise UserError(f"{url}: no .tar there; name a folder of WebDataset tars, or one tar")
    return found, stats


def _check_free(store: StageStore) -> None:
    """
    Raises:
        UserError: another dataset's index is there.
    """
    try:
        index = store.read(INDEX, max_bytes=MAX_INDEX_BYTES)
    except FileNotFoundError:
        return
    if not is_tar_index(index):
        raise UserError(f"{store.url}/{INDEX}: belongs to something else; name another folder by --out")


# ------------------------------------------------------------------------------------------------------------- one tar


def _known_or_read(storage: Storage, store: StageStore, name: str, size: int, stamp: str) -> tuple[TarIndexed, bool]:
    receipt = f"{rows_name(name)}.json"
    try:
        known = TarIndexed(**json.loads(store.read(receipt, max_bytes=MAX_DATASET_BYTES)))
        if (known.num_bytes, known.stamp) == (size, stamp) and stamp:
            return known, False
    except (FileNotFoundError, ValueError, TypeError):  # none, or of a process that was killed
        pass
    one, rows = with_retries(
        lambda deadline: _read_tar(storage, name, size, stamp, deadline),
        f"{storage.url}/{name}",
        _READS_BEFORE_GIVING_UP * max(DEADLINE_S, size / (1 << 20)),
    )
    store.replace(rows_name(name), rows)
    store.replace(receipt, json.dumps(vars(one)).encode())
    return one, True


def _read_tar(storage: Storage, name: str, size: int, stamp: str, deadline: float) -> tuple[TarIndexed, bytes]:
    where = f"{storage.url}/{name}"
    stream = TarStream(_chunks(storage, name, size, deadline), size, where)
    rows: list[tuple[int, ...]] = []
    keys: list[str] = []
    rejected: Counter[str] = Counter()
    for key, members in _groups(stream, where, rejected):
        try:
            rows.append(_row(members))
            keys.append(key)
        except ImageError as e:
            rejected[e.reason] += 1
    rows_NF = np.array(rows, dtype=np.int64).reshape(len(rows), 6)
    packed = pack_rows(rows_NF, keys)
    labels = rows_NF[:, 5]
    has_labels = bool((labels >= 0).any())
    one = TarIndexed(
        name, stamp, size, stream.hash(), len(rows), len(packed), xxhash.xxh64_hexdigest(packed), has_labels,
        dict(sorted(rejected.items())), labels.tolist() if has_labels else [],
    )  # fmt: skip
    return one, packed


def _chunks(storage: Storage, name: str, size: int, deadline: float) -> Iterator[bytes]:
    if not storage.is_local:
        yield from storage.ranges(name, size, deadline, stall_s=STALL_S)
        return
    with open(storage.path(name), "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


Content = tuple[Member, bytes]
"""A member, and what was read of it: all of a text, the beginning of an image."""


def _groups(stream: TarStream, where: str, rejected: Counter[str]) -> Iterator[tuple[str, dict[str, Content]]]:
    """Members that follow one another and are of one sample, by extension. The folder belongs to the sample's name."""
    key: str | None = None
    group: dict[str, Content] = {}
    seen: set[str] = set()
    for member in stream.members():
        if not member.is_file:
            rejected["no_file"] += 1
            continue
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        if not stem or not extension:
            rejected["no_extension"] += 1
            continue
        if key != (name := f"{folder}{slash}{stem}"):
            if key is not None:
                yield key, group
            if name in seen:
                raise UserError(
                    f"{where}: at byte {member.offset}: the members of {name} do not stand together; pack the tar again, "
                    "sorted by name"
                )
            seen.add(name)
            key, group = name, {}
        extension = extension.lower()
        limit = 16 if extension in _IMAGES else _READ.get(extension, 0)
        too_large = extension in _READ and member.size > limit
        content = b"" if too_large else stream.read(min(member.size, limit))
        if extension in group:
            raise UserError(f"{where}: at byte {member.offset}: {name} has two .{extension}; pack the tar again")
        group[extension] = (member, content)
    if key is not None:
        yield key, group


def _row(members: dict[str, Content]) -> tuple[int, ...]:
    """As data.wds.ROW_FIELDS.

    Raises:
        ImageError: no sample to train on.
    """
    images = [members[extension] for extension in _IMAGES if extension in members]
    if len(images) != 1:
        raise ImageError("several_images" if images else "no_image", "")
    image, begin = images[0]
    if image.size > MAX_IMAGE_BYTES:
        raise ImageError("image_too_large", "")
    image_format(begin)
    label = _label(members)
    for extension in ("txt", "json"):
        if extension not in members:
            continue
        member, content = members[extension]
        if member.size > MAX_CAPTION_BYTES:
            raise ImageError("caption_too_large", "")
        try:
            text = content.decode().strip() if extension == "txt" else json_caption(content)
        except ValueError:
            raise ImageError(f"broken_{extension}", "") from None
        if text:
            return image.offset, image.size, member.offset, member.size, int(extension == "json"), label
    if label < 0:
        raise ImageError("no_caption", "")
    return image.offset, image.size, 0, -1, 0, label


def _label(members: dict[str, Content]) -> int:
    if "cls" not in members:
        return -1
    text = members["cls"][1].strip()
    if not text.isdigit() or int(text) >= 1 << 31:
        raise ImageError("broken_cls", "")
    return int(text)


# ------------------------------------------------------------------------------------------------------------- publish


def _publish(store: StageStore, tars: list[TarIndexed], tars_url: str | None, overwrite: bool) -> DatasetInfo:
    """index.json, labels, and dataset.json last."""
    num_samples = sum(tar.num_samples for tar in tars)
    rejected: Counter[str] = Counter()
    for tar in tars:
        rejected.update(tar.rejected)
    if not num_samples:
        raise UserError(f"{store.url}: no sample to train on; left out: {dict(rejected)}")
    shards = [
        (Shard(tar.name, tar.num_samples, tar.num_bytes, tar.xxh64, {}), tar.rows_bytes, tar.rows_xxh64) for tar in tars
    ]
    index = make_tar_index(tars_url, shards)
    labels = b""
    if any(tar.has_labels for tar in tars):
        by_tar = [tar.labels if tar.has_labels else [-1] * tar.num_samples for tar in tars]
        labels = np.concatenate([np.array(one, dtype="<i4") for one in by_tar]).tobytes()
    info = DatasetInfo(
        name=store.url.rpartition("/")[2].removesuffix(".index").removesuffix(".tar") or "tars",
        num_samples=num_samples,
        index_digest=index_digest(index),
        rejected=dict(sorted(rejected.items())),
        labels=LABELS if labels else None,
        labels_xxh64=xxhash.xxh64_hexdigest(labels) if labels else None,
    )
    description = info.model_dump_json(indent=1).encode() + b"\n"
    if store.exists(DATASET):
        if store.read(DATASET, max_bytes=MAX_DATASET_BYTES) == description:
            return info
        if not overwrite:
            raise UserError(
                f"{store.url}: the tars have changed since they were indexed, and runs on that index would not resume on "
                "another; add --overwrite to replace it, or name another folder by --out"
            )
        store.delete(DATASET)
    if labels:
        store.replace(LABELS, labels)
    store.replace(INDEX, index)
    store.replace(DATASET, description)
    return info


def _compare(storage: Storage, tar: TarIndexed, stats: set[str]) -> str:
    """What img2dataset says that it has put into a tar, against what was found; empty where they agree."""
    name = f"{tar.name.removesuffix('.tar')}_stats.json"
    if name not in stats:
        return ""
    try:
        tree = json.loads(storage.read(name, max_bytes=_MAX_STATS_BYTES))
        successes = int(tree["successes"])
    except (ValueError, KeyError, TypeError):
        return f"{storage.url}/{name}: cannot be read"
    count = tar.num_samples + sum(n for reason, n in tar.rejected.items() if reason not in ("no_file", "no_extension"))
    if successes == count:
        return ""
    return f"{storage.url}/{tar.name}: holds {count} samples, {name} says {successes}"
