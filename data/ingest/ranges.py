"""Files at any fsspec URL, read forwards: in bounded memory, by ranges asked for ahead, with a deadline on every wait."""

import time
from collections.abc import Iterator
from typing import NamedTuple

import fsspec
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from data.deadlines import Call
from data.storage import StorageError, ask
from trainer.errors import UserError, one_line

RANGE_BYTES = 8 << 20
READ_DEADLINE_S = 300.0
"""For one range or one small file, all attempts together."""
SOURCE_DEADLINE_S = 3600.0
"""For a listing of what the user names: it may be of millions of files, and comes by pages of a thousand."""


class TooLarge(Exception):
    """A file has more bytes than it may have."""


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL or path, and its path there.

    Raises:
        UserError: no such protocol.
    """
    try:
        fs, path = url_to_fs(url)
        return fs, path
    except (ValueError, ImportError) as e:
        raise UserError(f"{url}: cannot be opened ({one_line(e)})") from None


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def read_object(fs: fsspec.AbstractFileSystem, path: str, max_bytes: int, deadline_s: float = READ_DEADLINE_S) -> bytes:
    """A whole small file, which is not read where it is larger than allowed.

    Raises:
        TooLarge: it is.
        FileNotFoundError: there is none.
        UserError: access is denied.
        StorageError: storage fails for longer than the deadline.
    """

    def read() -> bytes | TooLarge:
        size = fs.info(path)["size"]
        if size is not None and size > max_bytes:
            return TooLarge(f"{size} bytes, more than {max_bytes}")
        with fs.open(path, "rb") as file:
            data: bytes = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            return TooLarge(f"more than {max_bytes} bytes")
        if size is not None and len(data) != size:
            raise OSError(f"{len(data)} of {size} bytes arrived")
        return data

    data = ask(read, path, deadline_s=deadline_s)
    if isinstance(data, TooLarge):
        raise data
    return data


class _Range(NamedTuple):
    start: int
    end: int
    answer: Call[bytes]


class RangeReader:
    """A file from some byte on. The range behind the one in use is fetched meanwhile.

    Args:
        url: path or fsspec URL.
        num_bytes: size that the file must have; absent: whichever it has.

    Raises:
        UserError: missing, of another size, of unknown size, or access is denied.
        StorageError: storage fails for longer than the deadline.
    """

    def __init__(
        self, url: str, *, num_bytes: int | None = None, range_bytes: int = RANGE_BYTES, deadline_s: float = READ_DEADLINE_S
    ) -> None:  # fmt: skip
        self.url = url
        self._fs, self._path = filesystem(url)
        self._range_bytes, self._deadline_s = range_bytes, deadline_s
        self.size = self._find_size()
        if num_bytes is not None and num_bytes != self.size:
            raise UserError(
                f"{url}: has {self.size} bytes, had {num_bytes} when it was listed; put the file back, or begin anew in "
                "another folder"
            )
        self._data, self._start = b"", 0
        self._ahead: _Range | None = None

    def _find_size(self) -> int:
        try:
            size = ask(lambda: self._fs.info(self._path)["size"], self.url, deadline_s=self._deadline_s)
        except FileNotFoundError:
            raise UserError(f"{self.url}: no such file; was it moved?") from None
        if not isinstance(size, int):
            raise UserError(f"{self.url}: this server does not say how large the file is; copy it to other storage")
        return size

    def read(self, offset: int, count: int) -> bytes:
        """`count` bytes from `offset` on; fewer at the file's end."""
        end = min(offset + count, self.size)
        pieces = []
        while offset < end:
            if not self._start <= offset < self._start + len(self._data):
                self._load(offset)
            begin = offset - self._start
            piece = self._data[begin : begin + end - offset]
            pieces.append(piece)
            offset += len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def lines(self, offset: int, max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
        """(offset, line without its end) from `offset` on; None for a line of more than `max_bytes`."""
        while offset < self.size:
            end = self._find(b"\n", offset)
            length = end - offset
            yield offset, self.read(offset, length).removesuffix(b"\r") if length <= max_bytes else None
            offset = end + 1

    def _find(self, mark: bytes, offset: int) -> int:
        """Where the one byte `mark` is next; the file's size where it is no more."""
        while offset < self.size:
            if not self._start <= offset < self._start + len(self._data):
                self._load(offset)
            if (found := self._data.find(mark, offset - self._start)) >= 0:
                return self._start + found
            offset = self._start + len(self._data)
        return self.size

    def _load(self, offset: int) -> None:
        wanted, self._ahead = self._ahead, None
        if wanted is None or not wanted.start <= offset < wanted.end:
            wanted = self._ask(offset)
        try:
            # It ends by its own deadline; this is for what does not.
            data = wanted.answer.wait(time.monotonic() + 1.1 * self._deadline_s + 0.5)
        except FileNotFoundError:
            raise UserError(f"{self.url}: has gone while it was read; put the file back") from None
        except TimeoutError as e:
            raise StorageError(f"{self.url}: not read within {self._deadline_s:.0f} s ({e})") from e
        self._data, self._start = data, wanted.start
        if wanted.end < self.size:
            self._ahead = self._ask(wanted.end)

    def _ask(self, start: int) -> _Range:
        end = min(start + self._range_bytes, self.size)

        def read() -> bytes:
            data: bytes = self._fs.cat_file(self._path, start=start, end=end)
            # A server that does not know ranges answers with the whole file.
            if len(data) != end - start:
                raise OSError(f"{len(data)} bytes came for a range of {end - start}")
            return data

        answer = Call(lambda: ask(read, self.url, deadline_s=self._deadline_s), f"read {self.url}")
        return _Range(start, end, answer)
