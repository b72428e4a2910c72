"""Tar files read forward and strictly: what is broken is an error that names the tar and the place, never a lost rest."""

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import xxhash

from trainer.errors import UserError, one_line

_BLOCK = tarfile.BLOCKSIZE
_MAX_NAME_BYTES = 1 << 16
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LONG_NAME, _LONG_LINK = tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK
_PAX, _PAX_OF_ALL = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE), tarfile.XGLTYPE


@dataclass(frozen=True)
class Member:
    name: str
    """With forward slashes, without a leading `./`."""
    offset: int
    """Of its content in the tar."""
    size: int
    is_file: bool
    """Not a link or device."""


class TarStream:
    """The members of a tar but its folders, one after the other. The current one's content may be read until the next is asked
    for."""

    def __init__(self, chunks: Iterable[bytes], num_bytes: int, where: str) -> None:
        """
        Args:
            chunks: the tar's bytes.
            where: names it in errors.
        """
        self._chunks, self._num_bytes, self._where = iter(chunks), num_bytes, where
        self._hasher = xxhash.xxh64()
        self._rest = memoryview(b"")
        self._position = 0

    def members(self) -> Iterator[Member]:
        """
        Raises:
            UserError: a header is broken, a member is cut short, or the archive's end is missing or not its end.
        """
        name: str | None = None
        size: int | None = None
        while True:
            at = self._position
            block = self.read(_BLOCK)
            if not any(block):
                self._expect_end(at)
                return
            try:
                header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
            except (tarfile.HeaderError, UnicodeDecodeError) as e:
                raise self._error(at, f"broken header ({one_line(e)})") from None
            kind = header.type
            if kind in (_LONG_NAME, _LONG_LINK, _PAX_OF_ALL, *_PAX):
                data = self._record(header, at)
                if kind == _LONG_NAME:
                    name = self._text(data.rstrip(b"\0"), at)
                elif kind in _PAX:
                    name, size = self._pax(data, at, name, size)
                continue
            if kind == tarfile.GNUTYPE_SPARSE:
                raise self._error(at, f"{header.name} is a sparse file; pack the tar again without --sparse")
            if kind == tarfile.DIRTYPE:
                name = size = None
                continue
            member = Member(
                name=(header.name if name is None else name).removeprefix("./"),
                offset=self._position,
                # links and devices have no content, whatever their headers say
                size=(header.size if size is None else size) if kind in _FILES else 0,
                is_file=kind in _FILES,
            )
            name = size = None
            padded_end = member.offset + -(-member.size // _BLOCK) * _BLOCK
            if member.size < 0 or padded_end > self._num_bytes:
                raise self._error(at, f"{member.name} is cut short: it has {member.size} bytes")
            yield member
            self._skip(padded_end - self._position)

    def read(self, num_bytes: int) -> bytes:
        """The next bytes.

        Raises:
            UserError: the file ends before.
        """
        return b"".join(self._take(num_bytes))

    def hash(self) -> str:
        """xxh64 of the whole file; after the last member."""
        return str(self._hasher.hexdigest())

    def _skip(self, num_bytes: int) -> None:
        for _ in self._take(num_bytes):
            pass

    def _take(self, num_bytes: int) -> Iterator[memoryview]:
        while num_bytes:
            if not self._rest:
                chunk = next(self._chunks, b"")
                if not chunk:
                    raise self._error(self._position, "the file ends here, without the two empty blocks that end a tar")
                self._hasher.update(chunk)
                self._rest = memoryview(chunk)
            part, self._rest = self._rest[:num_bytes], self._rest[num_bytes:]
            num_bytes -= len(part)
            self._position += len(part)
            yield part

    def _record(self, header: tarfile.TarInfo, at: int) -> bytes:
        """What a header about the next member holds."""
        if not 0 <= header.size <= _MAX_NAME_BYTES:
            raise self._error(at, f"a header about the next member has {header.size} bytes")
        data = self.read(header.size)
        self._skip(-header.size % _BLOCK)
        return data

    def _pax(self, data: bytes, at: int, name: str | None, size: int | None) -> tuple[str | None, int | None]:
        """Records `LENGTH KEY=VALUE\\n`."""
        while data.strip(b"\0"):
            length, _, _ = data.partition(b" ")
            if not length.isdigit() or not 0 < int(length) <= len(data):
                raise self._error(at, "broken extended header")
            record, data = data[: int(length)], data[int(length) :]
            key, equals, value = record[len(length) + 1 : -1].partition(b"=")
            if not equals or record[-1:] != b"\n":
                raise self._error(at, "broken extended header")
            if key == b"path":
                name = self._text(value, at)
            elif key == b"size":
                if not value.isdigit():
                    raise self._error(at, "broken extended header")
                size = int(value)
            elif key.startswith(b"GNU.sparse"):
                raise self._error(at, "holds a sparse file; pack the tar again without --sparse")
        return name, size

    def _text(self, data: bytes, at: int) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self._error(at, "a name is not UTF-8") from None

    def _expect_end(self, at: int) -> None:
        if any(self.read(_BLOCK)):
            raise self._error(at, "one empty block among the members")
        while self._position < self._num_bytes:
            if any(self.read(min(self._num_bytes - self._position, 1 << 20))):
                raise self._error(at, "the archive ends here, and more follows; were two tars put into one file?")

    def _error(self, at: int, what: str) -> UserError:
        return UserError(f"{self._where}: at byte {at}: {what}; copy or pack the tar again")
