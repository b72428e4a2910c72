"""Lists of image URLs in parquet or JSON lines: cut into slices once, and each slice read where it lies.

The list is not copied: its URLs may hold credentials. It must stay as it is until the stage is done.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data.images import ImageError
from data.ingest.ranges import RangeReader, filesystem
from data.source import clean, first_text, parse_row
from data.storage import ask
from trainer.errors import UserError, one_line

SLICE_ROWS = 10_000
URL_COLUMNS = ("url", "URL", "image_url", "IMAGE_URL")
CAPTION_COLUMNS = ("caption", "captions", "text", "TEXT", "CAPTION")
LICENCE_COLUMNS = ("licence", "license", "LICENSE")
_MAX_LINE_BYTES = 1 << 20
_MAX_URL_CHARACTERS = 8192
_SLICE_DEADLINE_S = 900.0
"""For a slice, of whose row group much may have to be read first."""


@dataclass(frozen=True)
class Columns:
    """Names that the user gives; absent: the usual ones."""

    url: str | None = None
    caption: str | None = None
    licence: str | None = None

    def names(self) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
        return tuple(
            (given,) if given else usual
            for given, usual in (
                (self.url, URL_COLUMNS),
                (self.caption, CAPTION_COLUMNS),
                (self.licence, LICENCE_COLUMNS),
            )
        )  # type: ignore[return-value]


@dataclass(frozen=True)
class ManifestRow:
    number: int
    """From 0, in the whole manifest."""
    url: str = ""
    captions: Sequence[str] = ()
    licence: str | None = None
    problem: ImageError | None = None


def is_parquet(url: str) -> bool:
    return url.lower().endswith(".parquet")


def slices(url: str, num_bytes: int, columns: Columns) -> Iterator[dict[str, int]]:
    """Where each slice of a manifest begins, and how many rows it has.

    Raises:
        UserError: not readable, or without a column of URLs.
        StorageError: storage does not answer.
    """
    reader = RangeReader(url, num_bytes=num_bytes)
    if is_parquet(url):
        yield from _parquet_slices(url, columns)
        return
    start, first, rows, number = 0, 0, 0, 0
    for offset, line in reader.lines(0, _MAX_LINE_BYTES):
        if line is not None and not line.strip():
            continue
        if rows == SLICE_ROWS:
            yield {"offset": start, "first": first, "rows": rows}
            start, first, rows = offset, number, 0
        if number == 0 and line is not None:
            _column(parse_row(line, f"{url}:1"), columns.names()[0], url, "--url-column")
        rows += 1
        number += 1
    if rows:
        yield {"offset": start, "first": first, "rows": rows}


def read_slice(url: str, num_bytes: int, part: dict[str, int], columns: Columns) -> list[ManifestRow]:
    """The rows of a slice; what is no row is one with a problem.

    Raises:
        UserError: the manifest is not what it was when it was cut.
        StorageError: storage does not answer.
    """
    reader = RangeReader(url, num_bytes=num_bytes)
    rows = _parquet_rows(url, part, columns) if is_parquet(url) else _json_rows(reader, part)
    usual = columns.names()
    return [
        _manifest_row(part["first"] + i, row, usual) if isinstance(row, dict) else ManifestRow(part["first"] + i, problem=row)
        for i, row in enumerate(rows)
    ]  # fmt: skip


def _manifest_row(number: int, row: dict[str, Any], usual: tuple[Sequence[str], ...]) -> ManifestRow:
    url_names, caption_names, licence_names = usual
    url = next((row[name] for name in url_names if row.get(name) is not None), None)
    if not isinstance(url, str) or not url.strip() or len(url) > _MAX_URL_CHARACTERS:
        return ManifestRow(number, problem=ImageError("bad_row", f"row {number} has no URL"))
    captions = next((row[name] for name in caption_names if row.get(name)), ())
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, (list, tuple)) or not all(isinstance(text, str) for text in captions):
        return ManifestRow(number, problem=ImageError("bad_row", f"row {number} has a caption that is no text"))
    return ManifestRow(number, url.strip(), clean(captions), first_text(row, licence_names))


def _column(found: Any, names: Sequence[str], url: str, option: str) -> str:
    for name in names:
        if name in found:
            return name
    raise UserError(f"{url}: has no column {' or '.join(names)}, but {', '.join(map(str, list(found)[:20]))}; name it "
                    f"with {option}")  # fmt: skip


def _json_rows(manifest: RangeReader, part: dict[str, int]) -> Iterator[dict[str, Any] | ImageError]:
    left = part["rows"]
    for _, line in manifest.lines(part["offset"], _MAX_LINE_BYTES):
        if left == 0:
            return
        if line is not None and not line.strip():
            continue
        left -= 1
        number = part["first"] + part["rows"] - left
        try:
            yield parse_row(line, f"line {number}")
        except UserError as e:
            yield ImageError("bad_row", str(e))
    assert not left, f"{manifest.url}: fewer rows than were listed in as many bytes"


# ------------------------------------------------------------------------------------------------------------- parquet


def _parquet_slices(url: str, columns: Columns) -> Iterator[dict[str, int]]:
    def look() -> tuple[list[int], list[str]]:
        with _opened(url) as file:
            parquet = pq.ParquetFile(file)
            sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.metadata.num_row_groups)]
            return sizes, parquet.schema_arrow.names

    sizes, names = _with_deadline(look, url)
    _column(names, columns.names()[0], url, "--url-column")
    for name, option in ((columns.caption, "--caption-column"), (columns.licence, "--licence-column")):
        if name is not None:
            _column(names, [name], url, option)
    first = 0
    for group, size in enumerate(sizes):
        for skipped in range(0, size, SLICE_ROWS):
            rows = min(SLICE_ROWS, size - skipped)
            yield {"group": group, "skipped": skipped, "first": first, "rows": rows}
            first += rows


def _parquet_rows(url: str, part: dict[str, int], columns: Columns) -> list[dict[str, Any]]:
    def read() -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        with _opened(url) as file:
            # Buffered: else the whole column of a row group would be in memory.
            parquet = pq.ParquetFile(file, buffer_size=1 << 20)
            names = [name for usual in columns.names() for name in usual if name in parquet.schema_arrow.names]
            skip = part["skipped"]
            if part["group"] >= parquet.metadata.num_row_groups:
                return []
            for batch in parquet.iter_batches(SLICE_ROWS, row_groups=[part["group"]], columns=names):
                wanted = batch.slice(min(skip, len(batch)), part["rows"] - len(rows))
                skip = max(0, skip - len(batch))
                rows += wanted.to_pylist()
                if len(rows) == part["rows"]:
                    break
        return rows

    rows = _with_deadline(read, url)
    assert len(rows) == part["rows"], f"{url}: fewer rows than its footer says"
    return rows


def _opened(url: str) -> Any:
    fs, path = filesystem(url)
    return fs.open(path, "rb")


def _with_deadline(call: Any, url: str) -> Any:
    def read() -> Any:
        try:
            return call()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
            raise UserError(f"{url}: cannot be read as parquet ({one_line(e)})") from None
        except FileNotFoundError:
            raise UserError(f"{url}: no such file; was it moved?") from None

    return ask(read, url, deadline_s=_SLICE_DEADLINE_S)
