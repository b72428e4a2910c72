"""The folder of a run's checkpoints, at a path or any fsspec URL: whole writes, checked reads, listings. No torch.

Object stores have no rename, no fsync and no folders, and a failed upload may leave a truncated object; so nothing here
relies on any of them. An object is read only after the manifest has said how long it is.
"""

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import numpy as np
import xxhash
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from trainer.checkpoint.errors import CheckpointError, CorruptCheckpoint
from trainer.errors import UserError
from trainer.run_folder import make_folder, modified

COMMIT = "COMMIT"
MANIFEST = "manifest.json"
INDEX = "index.json"
SET_ASIDE = "SET-ASIDE.json"
HOLD_PREFIX = "HOLD-"

NAME = re.compile(r"step-(\d{8,18})-[0-9a-f]{8}")
"""A checkpoint: its step and a token, so that two attempts at one step never write to one place."""
HOLD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")

PART_BYTES = 16 << 20
"""Bytes of one request of a long read."""
PARTS_AT_ONCE = 8


@dataclass(frozen=True)
class Entry:
    """A checkpoint as the listing shows it."""

    name: str
    step: int
    sizes: dict[str, int]
    """Bytes of each object in it."""

    @property
    def committed(self) -> bool:
        return COMMIT in self.sizes and SET_ASIDE not in self.sizes

    @property
    def set_aside(self) -> bool:
        return SET_ASIDE in self.sizes

    @property
    def holds(self) -> tuple[str, ...]:
        return tuple(sorted(name.removeprefix(HOLD_PREFIX) for name in self.sizes if name.startswith(HOLD_PREFIX)))


class CheckpointFolder:
    """Names below are relative to the folder, `CHECKPOINT/OBJECT`."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.fs: fsspec.AbstractFileSystem
        try:
            self.fs, self.root = url_to_fs(self.url)
        except (ValueError, ImportError) as e:  # an unknown scheme, or one whose library is absent
            raise UserError(f"{url}: checkpoints cannot be kept there ({e}); give a path or an fsspec URL") from None
        self.is_local = isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def url_of(self, name: str) -> str:
        return f"{self.url}/{name}"

    def entries(self) -> list[Entry]:
        """Everything that is named like a checkpoint, committed or not, oldest step first."""
        with self._errors("listed", ""):
            found = []
            for name in self._children(self.root):
                match = NAME.fullmatch(name)
                if match:
                    found.append(Entry(name, int(match[1]), self.sizes(name)))
            return sorted(found, key=lambda entry: (entry.step, entry.name))

    def sizes(self, checkpoint: str) -> dict[str, int]:
        """Bytes of each object of a checkpoint, as storage tells them now."""
        with self._errors("listed", checkpoint):
            return self._children(self.path(checkpoint))

    def _children(self, path: str) -> dict[str, int]:
        self.fs.invalidate_cache()  # listings are cached, and other processes write here
        try:
            listing = self.fs.ls(path, detail=True)
        except FileNotFoundError:
            return {}
        # Some object stores list a folder within itself, as an object without a name.
        return {os.path.basename(item["name"].rstrip("/")): int(item["size"] or 0) for item in listing
                if item["name"].rstrip("/") != path}  # fmt: skip

    # ------------------------------------------------------------------------------------------------- writing

    def make(self, step: int) -> str:
        """A new, empty checkpoint; its name."""
        name = f"step-{step:08d}-{secrets.token_hex(4)}"
        with self._errors("made", name):
            if self.fs.exists(self.path(name)):
                raise CheckpointError(f"{self.url_of(name)}: exists already; try again")
            make_folder(self.fs, self.path(name))
            self._sync_folder(self.root)
            return name

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new object to write into. It appears, whole and durable, when the block ends without an error."""
        path = self.path(name)
        with self._errors("written", name):
            if self.is_local:
                with self._create_local(path) as file:
                    yield file
            else:
                file = self.fs.open(path, "wb")
                try:
                    yield file
                except BaseException:
                    # close() would publish what has been written so far as if it were the object
                    if isinstance(file, AbstractBufferedFile):
                        file.discard()
                        file.closed = True
                    else:  # what such storage has been given is there already
                        with contextlib.suppress(Exception):
                            file.close()
                        with contextlib.suppress(Exception):
                            self.fs.rm_file(path)
                    raise
                file.close()

    @contextlib.contextmanager
    def _create_local(self, path: str) -> Iterator[IO[bytes]]:
        temporary = f"{path}.tmp"
        file = self.fs.open(temporary, "wb")
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):  # a full disk fails again here, and the first error is the one to tell
                file.close()
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        file.close()
        os.replace(temporary, path)
        self._sync_folder(os.path.dirname(path))

    def _sync_folder(self, path: str) -> None:
        if not self.is_local:
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def write(self, name: str, data: bytes) -> None:
        with self.create(name) as file:
            file.write(data)

    def remove(self, checkpoint: str) -> None:
        """Delete a checkpoint, COMMIT first: half deleted, it is no longer one."""
        with self._errors("removed", checkpoint):
            commit = self.path(f"{checkpoint}/{COMMIT}")
            if self.fs.exists(commit):
                self.fs.rm_file(commit)
            self.fs.rm(self.path(checkpoint), recursive=True)

    def remove_object(self, name: str) -> None:
        with self._errors("removed", name):
            self.fs.rm_file(self.path(name))

    # ------------------------------------------------------------------------------------------------- reading

    def read_small(self, name: str, *, size: int, limit: int) -> bytes:
        """A whole object of `size` bytes, refused beyond `limit`."""
        if size > limit:
            raise CorruptCheckpoint(f"{self.url_of(name)}: {size} bytes, more than the {limit} it may have")
        return self.read(name, 0, size).tobytes()

    def read(self, name: str, begin: int, end: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Bytes [begin, end) of an object, uint8.

        Raises:
            CorruptCheckpoint: the object is missing or shorter.
        """
        buffer = np.empty(end - begin, dtype=np.uint8)
        starts = list(range(begin, end, PART_BYTES))
        with self._errors("read", name):
            for first in range(0, len(starts), PARTS_AT_ONCE):
                batch = starts[first : first + PARTS_AT_ONCE]
                ends = [min(start + PART_BYTES, end) for start in batch]
                # by default cat_ranges returns errors among the data
                parts = self.fs.cat_ranges([self.path(name)] * len(batch), batch, ends, on_error="raise")
                for start, stop, part in zip(batch, ends, parts, strict=True):
                    if len(part) != stop - start:
                        raise CorruptCheckpoint(
                            f"{self.url_of(name)}: ends at byte {start + len(part)}, {end} were expected"
                        )
                    buffer[start - begin : stop - begin] = np.frombuffer(part, dtype=np.uint8)
        return buffer

    def committed_at(self, checkpoint: str) -> float | None:
        """Unix time; None where the storage keeps no times.

        Raises:
            FileNotFoundError: it is not committed.
        """
        return modified(self.fs, self.path(f"{checkpoint}/{COMMIT}"))

    def checksum(self, name: str, size: int, on_bytes: Callable[[int], None] = lambda _: None) -> str:
        """xxh64 of an object of `size` bytes, read in pieces. `on_bytes`: told the length of each."""
        digest = xxhash.xxh64()
        piece = PART_BYTES * PARTS_AT_ONCE
        for begin in range(0, size, piece):
            data = self.read(name, begin, min(begin + piece, size)).data
            digest.update(data)
            on_bytes(len(data))
        return digest.hexdigest()

    # -------------------------------------------------------------------------------------------------- errors

    @contextlib.contextmanager
    def _errors(self, done: str, name: str) -> Iterator[None]:
        """Storage's errors in our words. The libraries' own go along as the cause."""
        try:
            yield
        except (UserError, CheckpointError):
            raise
        except Exception as e:
            url = self.url_of(name) if name else self.url
            what = " ".join(f"{type(e).__name__}: {e}".split())
            if isinstance(e, FileNotFoundError) and done == "read":
                raise CorruptCheckpoint(f"{url}: missing") from e
            code = e.errno if isinstance(e, OSError) else None
            if code in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{url}: storage is full; free space there or keep fewer checkpoints ({what})") from e
            if isinstance(e, (PermissionError, NotADirectoryError, FileExistsError)) or code == errno.EROFS:
                raise UserError(
                    f"{url}: cannot be {done}; give a folder of checkpoints that this user may use ({what})"
                ) from e
            raise CheckpointError(f"{url}: cannot be {done} ({what})") from e
