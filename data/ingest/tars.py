"""Samples of a WebDataset tar, strictly: nothing is left out unseen, and nothing of the tar is believed.

Members of one key that follow one another are a sample: `folder/000012.jpg`, `folder/000012.txt`, `folder/000012.json`; the key
is what stands before the first dot of the last part, with the folder. Where a header is damaged, reading goes on at the next
whole one. That, a member that is cut, and one that no dataset has (links, devices, names that leave the tar) come out as
samples with a problem, so that they are counted. tarfile parses the headers, but is not asked what to do about them.
"""

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from data.images import ImageError
from data.ingest.ranges import RangeReader
from trainer.errors import UserError

IMAGE_FIELDS = ("jpg", "jpeg", "jpe", "png", "webp")
OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "avif", "heic", "jxl", "jp2")
"""Read, so that they are counted as what they are."""
TEXT_FIELDS = ("txt", "json", "cls")
MAX_TEXT_BYTES = 1 << 20
MAX_NAME_CHARACTERS = 512

_BLOCK = tarfile.BLOCKSIZE
_MAX_EXTENSION_BYTES = 1 << 20
"""Of a pax header or a long name."""
_DATALESS = (tarfile.DIRTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_BAD_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\\\\\ud800-\udfff]")
"""Control characters, backslashes, and what was not UTF-8."""
_COMPRESSED = (
    (b"\x1f\x8b", "gzip", "gunzip"),
    (b"BZh", "bzip2", "bunzip2"),
    (b"\xfd7zXZ", "xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "zstd", "unzstd"),
)
_MAGIC, _MAGIC_AT = b"ustar", 257


@dataclass
class TarSample:
    """What stands under one key, or a problem met on the way."""

    key: str
    next: int = 0
    """Offset at which whatever follows begins: from there a reader goes on."""
    fields: dict[str, bytes] = field(default_factory=dict)
    """By extension, lower case, in the tar's order."""
    problem: ImageError | None = None

    def image(self) -> bytes | None:
        return next((data for name, data in self.fields.items() if name in (*IMAGE_FIELDS, *OTHER_IMAGES)), None)


@dataclass(frozen=True)
class _Member:
    start: int
    """Of its first header, long names included."""
    data: int
    """Offset."""
    size: int
    name: str
    kind: bytes

    @property
    def end(self) -> int:
        return self.data if self.kind in _DATALESS else self.data + -(-self.size // _BLOCK) * _BLOCK


class _Broken(Exception):
    """No header at `start`."""

    def __init__(self, start: int, why: str) -> None:
        super().__init__(start, why)
        self.start, self.why = start, why


class _Unsafe(Exception):
    """A member that is refused."""


def read_samples(tar: RangeReader, offset: int, *, max_image_bytes: int) -> Iterator[TarSample]:
    """The samples from `offset` on, which is 0 or the `next` of an earlier one.

    Raises:
        UserError: no tar, or a compressed one.
    """
    if offset == 0:
        _check_kind(tar)
    sample: TarSample | None = None
    while offset <= tar.size:  # beyond: told already that it is cut
        try:
            member = _next_member(tar, offset)
        except _Broken as e:
            if sample is not None:
                sample.next = e.start
                yield sample
                sample = None
            offset = _next_header(tar, e.start + 1)
            if e.start + _BLOCK > tar.size:
                problem, offset = ImageError("truncated", f"byte {e.start}: {e.why}"), tar.size + 1
            else:
                problem = ImageError("broken_header", f"byte {e.start}: {e.why}; {offset - e.start} bytes lost")
            yield TarSample(f"byte {e.start}", offset, problem=problem)
            continue
        if member is None:
            if sample is not None:
                sample.next = tar.size
                yield sample
            if tar.read(max(0, tar.size - 2 * _BLOCK), 2 * _BLOCK).strip(b"\0"):
                problem = ImageError("no_end_mark", "the tar may have been cut between two files")
                yield TarSample(f"byte {tar.size}", tar.size + 1, problem=problem)
            return
        offset = member.end
        if member.kind == tarfile.DIRTYPE:
            continue
        try:
            parts = _key_and_field(member)
        except _Unsafe as e:
            if sample is not None:
                sample.next = member.start
                yield sample
                sample = None
            problem = ImageError("unsafe_member", f"byte {member.start}: {e}")
            yield TarSample(f"byte {member.start}", offset, problem=problem)
            continue
        if parts is None:
            continue
        key, name = parts
        if sample is None or sample.key != key or name in sample.fields:
            if sample is not None:
                sample.next = member.start
                yield sample
            sample = TarSample(key)
        _read_field(tar, member, name, sample, max_image_bytes)
        if member.data + member.size > tar.size:
            sample.next = tar.size + 1
            yield sample
            return


def refuse_compressed(head: bytes, where: str) -> None:
    """
    Args:
        head: a file's first bytes, six or more.

    Raises:
        UserError: it is compressed as a whole.
    """
    for magic, kind, tool in _COMPRESSED:
        if head.startswith(magic):
            raise UserError(
                f"{where}: is compressed with {kind}, so nobody can begin in its midst; decompress it first ({tool})"
            )


def _check_kind(tar: RangeReader) -> None:
    head = tar.read(0, _BLOCK)
    refuse_compressed(head, tar.url)
    try:
        if head.strip(b"\0"):
            _parse(head, 0)
        elif not head:
            raise _Broken(0, "an empty file")
    except _Broken as e:
        if _next_header(tar, 1) == tar.size:
            raise UserError(f"{tar.url}: no tar, {e.why}; copy it again, or name the layout with --layout") from None


def _read_field(tar: RangeReader, member: _Member, name: str, sample: TarSample, max_image_bytes: int) -> None:
    limit = MAX_TEXT_BYTES if name in TEXT_FIELDS else max_image_bytes
    sample.fields[name] = b""
    if member.data + member.size > tar.size:
        missing = member.data + member.size - tar.size
        sample.problem = ImageError(
            "truncated", f"byte {member.start}: the tar ends {missing} bytes before {member.name}"
        )
    elif member.size > limit:
        sample.problem = ImageError("too_large", f"{member.name}: {member.size} bytes, the limit is {limit}")
    else:
        sample.fields[name] = tar.read(member.data, member.size)


def _key_and_field(member: _Member) -> tuple[str, str] | None:
    """(key, extension); None for what is of no use: extensions unknown here, hidden files.

    Raises:
        _Unsafe: a kind or name that no dataset has.
    """
    name = member.name
    if member.kind not in tarfile.REGULAR_TYPES or member.kind == tarfile.GNUTYPE_SPARSE:
        raise _Unsafe(f"{name[:80]!r} is no plain file but of tar's type {member.kind.decode('latin-1')!r}")
    if not name or len(name) > MAX_NAME_CHARACTERS or _BAD_CHARACTERS.search(name):
        raise _Unsafe(f"the name {name[:80]!r}")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or not parts:
        raise _Unsafe(f"the name {name[:80]!r} leads out of the tar")
    stem, _, extension = parts[-1].partition(".")
    extension = extension.lower()
    if not stem or extension not in (*IMAGE_FIELDS, *OTHER_IMAGES, *TEXT_FIELDS):
        return None
    return "/".join([*parts[:-1], stem]), extension


# -------------------------------------------------------------------------------------------------------------- headers


def _next_member(tar: RangeReader, start: int) -> _Member | None:
    """The member whose headers begin at `start`, or behind zeros there: where tars were joined, some lie between.

    Raises:
        _Broken: none does.
    """
    start = _behind_zeros(tar, start)
    position, long_name, pax = start, None, {}
    while position < tar.size:
        info = _parse(tar.read(position, _BLOCK), start)
        data = position + _BLOCK
        if info.type in (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE):
            if info.size > _MAX_EXTENSION_BYTES or data + info.size > tar.size:
                raise _Broken(start, f"an extended header of {info.size} bytes")
            content = tar.read(data, info.size)
            if info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif info.type == tarfile.XHDTYPE:
                pax = _parse_pax(content, start)
            position = data + -(-info.size // _BLOCK) * _BLOCK
            continue
        size = info.size
        if "size" in pax:
            if not pax["size"].isdecimal() or len(pax["size"]) > 18:
                raise _Broken(start, "a size that is none")
            size = int(pax["size"])
        kind = tarfile.GNUTYPE_SPARSE if any(word.startswith("GNU.sparse") for word in pax) else info.type
        return _Member(start, data, size, pax.get("path", long_name or info.name), kind)
    if position > start:
        raise _Broken(start, "the tar ends behind an extended header")
    return None


def _behind_zeros(tar: RangeReader, offset: int) -> int:
    while offset < tar.size:
        block = tar.read(offset, _BLOCK)
        if block.strip(b"\0"):
            break
        offset += len(block)
    return offset


def _parse(block: bytes, start: int) -> tarfile.TarInfo:
    if len(block) < _BLOCK:
        raise _Broken(start, "the tar ends within a header")
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as e:
        raise _Broken(start, f"no header ({e})") from None
    if info.size < 0:
        raise _Broken(start, "a negative size")
    return info


def _parse_pax(content: bytes, start: int) -> dict[str, str]:
    """Records of `LENGTH KEY=VALUE\\n`."""
    records: dict[str, str] = {}
    while content.strip(b"\0"):
        length, space, _ = content.partition(b" ")
        if not space or not length.isdigit() or len(length) > 8 or not 5 <= int(length) <= len(content):
            raise _Broken(start, "a pax header that is none")
        record, content = content[len(length) + 1 : int(length)], content[int(length) :]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise _Broken(start, "a pax header that is none")
        records[key.decode("utf-8", "replace")] = value[:-1].decode("utf-8", "surrogateescape")
    return records


def _is_header(block: bytes) -> bool:
    if len(block) < _BLOCK or block[_MAGIC_AT : _MAGIC_AT + len(_MAGIC)] != _MAGIC:
        return False
    try:
        return bool(tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape").size >= 0)
    except (tarfile.HeaderError, ValueError):
        return False


def _next_header(tar: RangeReader, offset: int) -> int:
    """Where the next header with a right checksum is, at whatever alignment; the tar's size where there is none."""
    step = 1 << 20
    while offset < tar.size:
        window = tar.read(offset, step + _BLOCK)
        found = window.find(_MAGIC, _MAGIC_AT)
        while 0 <= found < step + _MAGIC_AT:
            begin = found - _MAGIC_AT
            if _is_header(window[begin : begin + _BLOCK]):
                return offset + begin
            found = window.find(_MAGIC, found + 1)
        offset += step
    return tar.size
