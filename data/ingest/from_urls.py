"""Parts of a slice of a manifest: images by URL."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.images import ImageError
from data.ingest.examine import Filters, Found, PartWriter
from data.ingest.fetch import Fetcher, FetchError, FetchLimits
from data.ingest.from_folders import read_image_file
from data.ingest.manifests import Columns, ManifestRow, read_slice
from data.ingest.ranges import filesystem, is_local
from data.stages.receipts import part_receipts
from data.stages.runner import PART_SAMPLES, Part, Work
from data.stages.spared import spared
from data.stages.store import Json
from data.storage import StorageError
from trainer.urls import public_source

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "hf")
"""The only protocols beside http and https that a list of URLs may name: fsspec knows others that reach anywhere."""

SILENT_HOSTS = 20
STUCK_OBJECTS = 3
"""Of a part, that storage may fail to give for its whole deadline, each counted; of more, it is storage that fails."""


@dataclass(frozen=True)
class UrlOptions:
    per_host: int = 4
    connections: int = 64
    timeout_s: float = 30.0
    attempts: int = 3
    allow_private: bool = False
    allow_local: bool = False
    allow_object_stores: bool = False


def url_parts(work: Work, columns: Columns, filters: Filters, options: UrlOptions) -> Iterator[Part]:
    """Of every 1,000 rows of the slice their own. The cursor is the row behind them.

    Raises:
        Exception: some rows cannot be done, or not now. The others are done first (see `spared`).
    """
    item = work.item
    done = {receipt["cursor"]["row"] for receipt in part_receipts(work.store, "ingest", item["name"])[: work.part]}
    if len(done) == -(-item["slice"]["rows"] // PART_SAMPLES):
        return
    rows = read_slice(item["url"], item["bytes"], item["slice"], columns)
    ends = [min(begin + PART_SAMPLES, len(rows)) for begin in range(0, len(rows), PART_SAMPLES)]
    with ExitStack() as stack:
        limits = FetchLimits(
            filters.max_image_bytes, options.per_host, options.connections, options.timeout_s, attempts=options.attempts,
            allow_private=options.allow_private,
        )  # fmt: skip
        getter = _Getter(stack, limits, item["url"], options)
        yield from spared(
            (_part(work, rows, end, getter, filters) for end in ends if end not in done), "parts of 1,000 rows"
        )


def rows_left(item: Json, receipts: Sequence[Json]) -> dict[str, int]:
    """Of an item that is not done to its end."""
    return {"samples": item["slice"]["rows"] - sum(receipt["counts"]["read"] for receipt in receipts)}


def _part(work: Work, rows: Sequence[ManifestRow], end: int, getter: "_Getter", filters: Filters) -> Iterator[Part]:
    """The part that ends before row `end`."""
    some = rows[(end - 1) // PART_SAMPLES * PART_SAMPLES : end]
    part = PartWriter(work.scratch, filters)
    # By the row, as one that was left behind with another part may land late.
    files = [work.scratch / f"{row.number}.fetched" for row in some]
    # All of a part at once: a slow host then holds up its own images only.
    futures = [getter.submit(row, file) for row, file in zip(some, files, strict=True)]
    try:
        for row, file, future in zip(some, files, futures, strict=True):
            while not future.done():
                wait([future], timeout=1.0)
                work.advance(0)
            _take(part, row, future, file, f"{work.item['prefix']}/{row.number:09d}")
            work.advance()
    finally:
        for file, future in zip(files, futures, strict=True):
            future.cancel()
            file.unlink(missing_ok=True)
    getter.check_network()
    yield part.close({"row": end})


def _take(part: PartWriter, row: ManifestRow, future: "Future[None]", file: Path, key: str) -> None:
    try:
        future.result()
    except ImageError as e:
        part.reject(key, e)
        return
    except StorageError:
        if part.counts["rejected/storage_failed"] == STUCK_OBJECTS:
            raise
        part.reject(key, ImageError("storage_failed", "storage did not give it within its deadline"))
        return
    image = file.read_bytes()
    file.unlink()
    part.take(key, image, Found(row.captions, None, row.licence, public_source(row.url)))


class _Getter:
    """Brings what a row names to a file, by whichever protocol it names."""

    def __init__(self, stack: ExitStack, limits: FetchLimits, manifest: str, options: UrlOptions) -> None:
        self._stack, self._limits, self._options = stack, limits, options
        self._manifest = manifest
        self._fetcher: Fetcher | None = None
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, row: ManifestRow, target: Path) -> "Future[None]":
        if row.problem is not None:
            return _failed(row.problem)
        scheme, has_scheme, _ = row.url.partition("://")
        scheme = scheme.lower() if has_scheme else "file"
        if scheme in ("http", "https"):
            if self._fetcher is None:
                self._fetcher = self._stack.enter_context(Fetcher(self._limits))
            return self._fetcher.submit(row.url, target)
        if "::" in row.url or (scheme not in OBJECT_STORES and scheme != "file"):
            return _failed(FetchError("bad_url", f"the scheme {scheme[:20]!r}"))
        url = row.url
        if scheme == "file":
            if not self._options.allow_local:
                return _failed(FetchError("local_file", "files of this machine are read with --allow-local only"))
            url = self._local(url)
        elif not self._options.allow_object_stores:
            # with our own credentials: whoever wrote the list could have our private objects published
            return _failed(FetchError("object_store", "object stores are read with --allow-object-stores only"))
        if self._pool is None:
            self._pool = ThreadPoolExecutor(16)
            self._stack.callback(self._pool.shutdown, wait=False, cancel_futures=True)
        return self._pool.submit(self._read, url, target)

    def check_network(self) -> None:
        """
        Raises:
            StorageError: of many hosts none has answered: that is this machine's network, and no reason to drop images.
        """
        if self._fetcher is not None and (silent := self._fetcher.all_silent()) >= SILENT_HOSTS:
            raise StorageError(f"none of {silent} hosts answers; is this machine connected?")
        if self._fetcher is not None:
            self._fetcher.forget()

    def _local(self, url: str) -> str:
        """A path, from the manifest's folder on where it is relative."""
        path = unquote(urlsplit(url).path) if url.lower().startswith("file://") else url
        fs, manifest = filesystem(self._manifest)
        return str(Path(manifest).parent / path) if is_local(fs) else path

    def _read(self, url: str, target: Path) -> None:
        fs, path = filesystem(url)
        target.write_bytes(read_image_file(fs, path, self._limits.max_bytes))


def _failed(why: ImageError) -> "Future[None]":
    future: Future[None] = Future()
    future.set_exception(why)
    return future
