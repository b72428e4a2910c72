"""Parts of a slice of a manifest: images by URL."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data.images import ImageError
from data.ingest.examine import Filters, Found, PartWriter
from data.ingest.fetch import Fetcher, FetchError, FetchLimits, public_url
from data.ingest.from_folders import read_image_file
from data.ingest.manifests import Columns, ManifestRow, read_slice
from data.ingest.ranges import filesystem, is_local
from data.stages.runner import PART_SAMPLES, Part, Work
from data.storage import StorageError

OBJECT_STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oci", "hf")
"""The only protocols beside http and https that a list of URLs may name: fsspec knows others that reach anywhere."""

SILENT_HOSTS = 20


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
    """The cursor is the next row of the slice."""
    item = work.item
    begin = work.cursor["row"] if work.cursor else 0
    if begin >= item["slice"]["rows"]:
        return
    rows = read_slice(item["url"], item["bytes"], item["slice"], columns)
    with ExitStack() as stack:
        limits = FetchLimits(
            filters.max_image_bytes, options.per_host, options.connections, options.timeout_s, attempts=options.attempts,
            allow_private=options.allow_private,
        )  # fmt: skip
        getter = _Getter(stack, limits, item["url"], options)
        while begin < len(rows):
            some = rows[begin : begin + PART_SAMPLES]
            begin += len(some)
            part = PartWriter(work.scratch, filters)
            # All of a part at once: a slow host then holds up its own images only.
            futures = [getter.submit(row, work.scratch / f"{i:04d}.fetched") for i, row in enumerate(some)]
            try:
                for i, (row, future) in enumerate(zip(some, futures, strict=True)):
                    while not future.done():
                        wait([future], timeout=1.0)
                        work.advance(0)
                    _take(part, row, future, work.scratch / f"{i:04d}.fetched", f"{item['prefix']}/{row.number:09d}")
                    work.advance()
            finally:
                for future in futures:
                    future.cancel()
            getter.check_network()
            yield part.close({"row": begin})


def _take(part: PartWriter, row: ManifestRow, future: "Future[None]", file: Path, key: str) -> None:
    try:
        future.result()
    except ImageError as e:
        part.reject(key, e)
        return
    image = file.read_bytes()
    file.unlink()
    part.take(key, image, Found(row.captions, None, row.licence, public_url(row.url)))


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
