"""Build a dataset from a folder of images: read, shrink if asked, write MDS shards, publish.

A folder becomes a dataset by one rename when all of it is on disk, so a killed build leaves nothing that looks whole.
To a URL the shards go first and `dataset.json`, without which nobody opens it, last.
"""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import simplejpeg

from data.images import ImageError, image_format, read_image
from data.mds import mds
from data.schema import (
    COLUMNS,
    DATASET,
    HASH,
    INDEX,
    MAX_SHARD_BYTES,
    REJECTED,
    DatasetInfo,
    Resize,
    index_digest,
    parse_index,
)
from data.source import Entry, Source
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
    overwrite: bool = False,
    progress: Callable[[], None] = lambda: None,
) -> Built:
    """Write the images of `source` as a dataset at `out`, a folder or an fsspec URL.

    Args:
        resize: what to do to the images; by default nothing, the files' bytes are kept.
        max_samples: stop after so many.
        order_seed: put the images in an order drawn from it; absent: the source's.
        overwrite: replace a dataset that is there.
        progress: called after each image.

    Raises:
        UserError: `out` is taken or cannot be written, or no image is usable.
        StorageError: remote storage fails.
    """
    if not 0 < shard_mib << 20 <= MAX_SHARD_BYTES - _SHARD_OVERHEAD_BYTES:
        raise UserError(f"--shard-mib: {shard_mib} is not between 1 and 4095")
    storage = Storage(out)
    for images in (source.folder, *source.more_folders):
        _check_free(storage, images, overwrite)
    with _temporary_folder(storage) as folder:
        rejected: list[Rejected] = []
        samples = _samples(source.ordered(order_seed), resize, shard_mib << 20, rejected, progress)
        num_samples = _write_shards(folder, samples, shard_mib << 20, max_samples)
        if not num_samples:
            why = f"all {len(rejected)} rejected, the first as {rejected[0].reason}" if rejected else "none"
            raise UserError(f"{source.folder}: no usable image ({why}); see `loupe data build --help` for the layouts")
        index = (folder / INDEX).read_bytes()
        info = DatasetInfo(
            name=name,
            num_samples=num_samples,
            index_digest=index_digest(index),
            resize=resize,
            order_seed=order_seed,
            class_names=source.class_names,
            notice=_copy_notices(source, folder),
            rejected=dict(sorted(Counter(r.reason for r in rejected).items())),
            merged_rows=source.merged_rows,
        )
        if rejected:
            lines = (json.dumps(vars(r), ensure_ascii=False) + "\n" for r in rejected)
            (folder / REJECTED).write_text("".join(lines), encoding="utf-8")
        (folder / DATASET).write_text(info.model_dump_json(indent=1) + "\n", encoding="utf-8")
        num_bytes = sum(file.stat().st_size for file in folder.iterdir())
        _publish(folder, storage, overwrite)
    return Built(info, len(parse_index(index, source=INDEX)), num_bytes, rejected)


# -------------------------------------------------------------------------------------------------------------- samples


def _samples(
    entries: Iterable[Entry],
    resize: Resize,
    shard_bytes: int,
    rejected: list[Rejected],
    progress: Callable[[], None],
) -> Iterator[dict[str, Any]]:
    for entry in entries:
        try:
            sample = _sample(entry, resize)
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
        data = _encode(shrunk_HWC, target, resize.quality or 90)
    return {"key": entry.key, "image": data, "captions": list(entry.captions), "label": entry.label}


def _encode(image_HWC: Any, kind: str, quality: int) -> bytes:
    if kind == "jpeg":  # full colour resolution: halved chroma shows at the sizes that people shrink to
        return bytes(simplejpeg.encode_jpeg(image_HWC, quality=quality, colorsubsampling="444"))
    options = [cv2.IMWRITE_WEBP_QUALITY, quality] if kind == "webp" else []
    done, encoded = cv2.imencode(f".{kind}", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), options)
    assert done
    return bytes(encoded.tobytes())


def _write_shards(folder: Path, samples: Iterator[dict[str, Any]], shard_bytes: int, max_samples: int | None) -> int:
    """Shards and index.json into `folder`; returns the number of samples."""
    # Not as a context manager: on an error that would still write the index of what there is.
    writer = mds().Writer(columns=COLUMNS, out=str(folder), hashes=[HASH], size_limit=shard_bytes)
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


def _copy_notices(source: Source, folder: Path) -> str | None:
    """The source's licence files, as they are and as one text."""
    texts = []
    for path in source.notices():
        name = f"{path.parent.name}-{path.name}" if source.more_folders else path.name
        shutil.copyfile(path, folder / name)
        texts.append(path.read_text(encoding="utf-8", errors="replace").strip())
    return "\n\n".join(texts) or None


# -------------------------------------------------------------------------------------------------------------- publish


def _check_free(storage: Storage, source: Path, overwrite: bool) -> None:
    """
    Raises:
        UserError: `out` is taken, is not a dataset that may be replaced, or overlaps the source.
    """
    if storage.is_local:
        out, images = Path(storage.root).resolve(), source.resolve()
        if out.is_relative_to(images) or images.is_relative_to(out):
            raise UserError(f"{storage.url}: overlaps the source {source}; name a folder elsewhere")
        if out.exists() and not out.is_dir():
            raise UserError(f"{storage.url}: is a file; name a folder")
    names = file_names(storage)
    if not names:
        return
    if INDEX not in names and DATASET not in names:
        raise UserError(f"{storage.url}: holds other files and no dataset; name a new folder")
    if not overwrite:
        raise UserError(
            f"{storage.url}: holds a dataset already; add --overwrite to replace it, or name another folder"
        )


def file_names(storage: Storage) -> list[str]:
    storage.fs.invalidate_cache()
    try:
        return [os.path.basename(path.rstrip("/")) for path in storage.fs.ls(storage.root, detail=False)]
    except FileNotFoundError:
        return []


@contextmanager
def _temporary_folder(storage: Storage) -> Iterator[Path]:
    """Beside a local `out`, so that a rename publishes it; removed if it was not."""
    if storage.is_local:
        out = Path(storage.root)
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
        except OSError as e:
            raise UserError(f"{storage.url}: cannot be written ({e.strerror}); name a writable folder") from None
    else:
        folder = Path(tempfile.mkdtemp(prefix="loupe-build-"))
    try:
        yield folder
    except OSError as e:
        if e.filename is not None and not str(e.filename).startswith(str(folder)):
            raise
        raise UserError(f"{folder}: cannot be written ({e.strerror}); free space or name another folder") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, storage: Storage, overwrite: bool) -> None:
    if storage.is_local:
        _publish_local(folder, Path(storage.root), overwrite)
    else:
        _upload(folder, storage)


def _publish_local(folder: Path, out: Path, overwrite: bool) -> None:
    for file in folder.iterdir():
        _flush(file)
    _flush(folder)
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)  # mkdtemp's is private
    if overwrite and out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
        os.rename(out, old / out.name)
        os.rename(folder, out)
        shutil.rmtree(old)
    else:
        try:
            os.rename(folder, out)  # replaces an empty folder
        except OSError as e:
            raise UserError(f"{out}: was made by another process meanwhile ({e.strerror}); add --overwrite") from None
    _flush(out.parent)


def _upload(folder: Path, storage: Storage) -> None:
    """Shards first, `dataset.json` last; what opens the old dataset is removed before its shards are replaced."""
    old = file_names(storage)
    for name in (DATASET, INDEX):
        if name in old:
            storage.fs.rm_file(storage.path(name))
    files = sorted((file for file in folder.iterdir()), key=lambda f: (f.name == DATASET, f.name == INDEX, f.name))
    storage.fs.makedirs(storage.root, exist_ok=True)
    for file in files:
        storage.put(file, file.name)
    new = {file.name for file in files}
    for name in old:
        if name.endswith(".mds") and name not in new:
            storage.fs.rm_file(storage.path(name))


def _flush(path: Path) -> None:
    """To disk, file or folder, so that a power cut after the rename finds it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
