"""Datasets and single files to where they stay: whole under their final name, or not there.

A folder becomes a dataset by one rename. Where there is no such rename, what opens a dataset goes last, and first when one is
replaced.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data.schema import DATASET, INDEX
from data.storage import CHUNK_BYTES, DEADLINE_S, LIST_DEADLINE_S, Storage
from trainer.errors import UserError


def check_free(storage: Storage, source: Path, overwrite: bool) -> None:
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
    names = storage.names(hidden=True)
    if not names:
        return
    if INDEX not in names and DATASET not in names:
        raise UserError(f"{storage.url}: holds other files and no dataset; name a new folder")
    if not overwrite:
        raise UserError(
            f"{storage.url}: holds a dataset already; add --overwrite to replace it, or name another folder"
        )


def check_writable(storage: Storage) -> None:
    """By writing an empty file: better known before hours of work than after.

    Raises:
        UserError: no such bucket, or access is denied.
        StorageError: storage fails.
    """
    if storage.is_local:
        return
    name = f"write-test-{secrets.token_hex(4)}"
    put_bytes(storage, b"", name)
    storage.delete(name)


def file_details(storage: Storage) -> dict[str, int]:
    """Bytes of each file by name; none where there is no such folder."""

    def look() -> list[dict[str, Any]]:
        storage.fs.invalidate_cache()
        try:
            return list(storage.fs.ls(storage.root, detail=True))
        except FileNotFoundError:
            return []

    found = storage.ask(look, "", LIST_DEADLINE_S, "listed")
    return {os.path.basename(file["name"]): int(file["size"]) for file in found if file["type"] == "file"}


@contextmanager
def temporary_folder(storage: Storage) -> Iterator[Path]:
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


def publish(folder: Path, storage: Storage, overwrite: bool) -> None:
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
    old = storage.names(hidden=True)
    for name in (DATASET, INDEX):
        if name in old:
            storage.delete(name)
    files = sorted((file for file in folder.iterdir()), key=lambda f: (f.name == DATASET, f.name == INDEX, f.name))
    for file in files:
        put_whole(storage, file, file.name)
    new = {file.name for file in files}
    for name in old:
        if name.endswith(".mds") and name not in new:
            storage.delete(name)


def put_whole(storage: Storage, file: Path, name: str) -> None:
    """Bring a file to `name`, over what is there; nobody sees a part of it.

    Raises:
        UserError: access is denied, there is no such bucket, or the disk is full.
        StorageError: storage fails.
    """
    if not storage.is_local:
        try:
            storage.put(file, name)
        except FileNotFoundError:
            raise no_bucket(storage) from None
        return
    storage.ask(lambda: _copy_whole(file, Path(storage.path(name))), name, DEADLINE_S, "written", file.stat().st_size)


def _copy_whole(file: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(file, "rb") as source:
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy, CHUNK_BYTES)
                copy.flush()
                os.fsync(copy.fileno())
        os.replace(temporary, target)
    except OSError as e:
        raise UserError(f"{target}: cannot be written ({e.strerror}); free space or name another folder") from None
    finally:
        temporary.unlink(missing_ok=True)


def put_bytes(storage: Storage, data: bytes, name: str) -> None:
    """As `put_whole`, of a small file's content."""
    with tempfile.TemporaryDirectory(prefix="loupe-put-") as folder:
        file = Path(folder) / "file"
        file.write_bytes(data)
        put_whole(storage, file, name)


def no_bucket(storage: Storage) -> UserError:
    """Storage finds no place for a file: buckets are made by people, not by a mistyped name."""
    return UserError(f"{storage.url}: there is no such bucket; make it, or mend the URL")


def _flush(path: Path) -> None:
    """To disk, file or folder, so that a power cut after the rename finds it whole."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
