"""Images by URL over HTTP: many at once, few from one host, none from private addresses, each bounded in size and time."""

import asyncio
import errno
import random
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Coroutine
from concurrent.futures import Future
from concurrent.futures import ThreadPoolExecutor as Threads
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import aiohttp
from yarl import URL

from data.images import ImageError, image_format
from data.ingest.addresses import PrivateAddress, PublicResolver, is_literal, is_public, public_socket

MAX_REDIRECTS = 5
MAX_RETRY_AFTER_S = 60.0
"""A host that asks for a longer pause is not asked again."""
SILENT_HOST = 20
"""Failures to connect in a row, after which a host is not asked again."""
USER_AGENT = "loupe-data (fetches images for a training set)"
_HEAD_BYTES = 16
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 10.0
_RETRIED = {408, 425, 429}
_FORBIDDEN = ("noai", "noimageai")
"""Words of X-Robots-Tag by which a site says that its images are not for training."""
_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)
"""Errors of this machine, no URL's fault."""


@dataclass(frozen=True)
class FetchLimits:
    max_bytes: int
    per_host: int = 4
    """Requests at once."""
    connections: int = 64
    """Requests at once, to all hosts."""
    timeout_s: float = 30.0
    """Of one request, with its body."""
    connect_s: float = 10.0
    attempts: int = 3
    allow_private: bool = False


class FetchError(ImageError):
    """A URL that gave no image. `retry`: it may on another try, after `pause_s`."""

    def __init__(self, reason: str, detail: str, *, retry: bool = False, pause_s: float | None = None) -> None:
        super().__init__(reason, detail)
        self.retry, self.pause_s = retry, pause_s


@dataclass
class _Host:
    slots: asyncio.Semaphore
    quiet_until: float = 0.0
    """By Retry-After."""
    silent: list[str] = field(default_factory=list)
    """Reasons of the last failures to connect, since one that worked."""
    answered: bool = False


class Fetcher:
    """A thread with an event loop that fetches what it is handed. Use it as a context."""

    def __init__(self, limits: FetchLimits) -> None:
        self._limits = limits
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fetch", daemon=True)
        self._hosts: dict[str, _Host] = defaultdict(lambda: _Host(asyncio.Semaphore(limits.per_host)))

    def __enter__(self) -> "Fetcher":
        self._thread.start()
        self._call(self._open()).result(60)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call(self._close()).result(30)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)

    def submit(self, url: str, target: Path) -> "Future[None]":
        """Begin to fetch an image to a file. The future raises FetchError."""
        return self._call(self._fetch(url, target))

    def all_silent(self) -> int:
        """How many hosts could not be reached, where no host at all could; else 0."""
        unreachable = {"dns", "refused", "timeout", "network"}
        hosts = list(self._hosts.values())
        if any(host.answered for host in hosts):
            return 0
        return sum(bool(host.silent) and host.silent[-1] in unreachable for host in hosts)

    def forget(self) -> None:
        """Count who answers anew: a network that is lost later must be told from hosts that are gone."""
        for host in self._hosts.values():
            host.answered = False
            host.silent.clear()

    def _call(self, work: Coroutine[Any, Any, None]) -> "Future[None]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        # Names are resolved by these: one that hangs must not hold up the others.
        self._threads = Threads(32, thread_name_prefix="resolve")
        self._loop.set_default_executor(self._threads)
        self._loop.run_forever()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._loop.close()

    async def _open(self) -> None:
        self._slots = asyncio.Semaphore(self._limits.connections)
        guards: dict[str, Any] = {}
        if not self._limits.allow_private:
            guards = {"resolver": PublicResolver(), "socket_factory": public_socket}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=300, **guards),
            timeout=aiohttp.ClientTimeout(total=self._limits.timeout_s, sock_connect=self._limits.connect_s),
            # No proxy of the environment: it would connect where we would not. No compression: images have theirs.
            trust_env=False,
            auto_decompress=False,
            headers={"User-Agent": USER_AGENT, "Accept": "image/jpeg,image/png,image/webp", "Accept-Encoding": "identity"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )  # fmt: skip

    async def _close(self) -> None:
        this = asyncio.current_task()
        tasks = [task for task in asyncio.all_tasks() if task is not this]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    # ------------------------------------------------------------------------------------------------------- one image

    async def _fetch(self, url: str, target: Path) -> None:
        for attempt in range(1, self._limits.attempts + 1):
            try:
                return await self._follow(url, target)
            except FetchError as e:
                target.unlink(missing_ok=True)
                if not e.retry or attempt == self._limits.attempts:
                    raise
                longest = min(_FIRST_PAUSE_S * 2**attempt, _LONGEST_PAUSE_S)
                await asyncio.sleep(random.uniform(longest / 2, longest) if e.pause_s is None else e.pause_s)
        return None

    async def _follow(self, url: str, target: Path) -> None:
        """One try, from redirect to redirect, each looked at as the first URL is."""
        for _ in range(MAX_REDIRECTS + 1):
            asked = self._checked(url)
            assert asked.host
            host = self._hosts[asked.host]
            async with host.slots:
                if len(host.silent) >= SILENT_HOST:
                    raise FetchError(host.silent[-1], f"{asked.host}: {SILENT_HOST} failures to connect in a row")
                await asyncio.sleep(max(0.0, host.quiet_until - time.monotonic()))
                async with self._slots:
                    location = await self._ask(asked, host, target)
            if location is None:
                return
            url = location
        raise FetchError("redirects", f"more than {MAX_REDIRECTS}")

    def _checked(self, url: str) -> URL:
        try:
            asked = URL(url)
            host, _ = asked.host, asked.port
        except ValueError:
            raise FetchError("bad_url", "no URL") from None
        if asked.scheme not in ("http", "https") or not host:
            raise FetchError("bad_url", f"the scheme {asked.scheme[:20]!r}, or no host")
        if not self._limits.allow_private and is_literal(host) and not is_public(host):
            raise FetchError("private_address", host)
        return asked

    async def _ask(self, url: URL, host: _Host, target: Path) -> str | None:
        """The image into `target`, or where it has gone."""
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                host.silent.clear()
                host.answered = True
                if response.status in (301, 302, 303, 307, 308):
                    location = response.headers.get("Location", "")
                    if not location:
                        raise FetchError("redirects", "a redirect to nowhere")
                    return str(url.join(URL(location)))
                self._check_status(response, host)
                await self._write(response, target)
                return None
        except FetchError:
            raise
        except Exception as e:  # aiohttp has two dozen kinds; each is told apart by what a second try may mend
            error = _told_apart(e, url.host or "")
            if error.reason in ("dns", "refused", "timeout", "network", "tls", "private_address"):
                host.silent.append(error.reason)
            raise error from e

    def _check_status(self, response: aiohttp.ClientResponse, host: _Host) -> None:
        status, name = response.status, response.url.host
        if status == 200:
            robots = ",".join(response.headers.getall("X-Robots-Tag", [])).lower()
            if any(word.strip().rpartition(":")[2].strip() in _FORBIDDEN for word in robots.split(",")):
                raise FetchError("not_allowed", f"{name}: X-Robots-Tag forbids training")
            return
        retry = status in _RETRIED or status >= 500
        pause_s = _retry_after(response.headers.get("Retry-After")) if retry else None
        if pause_s is not None:
            retry = pause_s <= MAX_RETRY_AFTER_S
            host.quiet_until = time.monotonic() + min(pause_s, MAX_RETRY_AFTER_S)
        raise FetchError(f"http_{status // 100}xx", f"{name}: status {status}", retry=retry, pause_s=pause_s)

    async def _write(self, response: aiohttp.ClientResponse, target: Path) -> None:
        limit = self._limits.max_bytes
        if (response.content_length or 0) > limit:
            raise FetchError("too_large", f"{response.content_length} bytes, the limit is {limit}")
        num_bytes, head, known = 0, b"", False
        with open(target, "wb") as file:
            async for chunk in response.content.iter_any():
                num_bytes += len(chunk)
                if num_bytes > limit:
                    raise FetchError("too_large", f"more than {limit} bytes")
                file.write(chunk)
                if not known:
                    head += chunk[:_HEAD_BYTES]
                    known = len(head) >= _HEAD_BYTES and _check_image(head)
        if not known:
            _check_image(head)


def _check_image(head: bytes) -> bool:
    try:
        image_format(head)
    except ImageError:
        raise FetchError("not_an_image", f"begins with {head[:12]!r}") from None
    return True


def _told_apart(error: Exception, host: str) -> FetchError:
    """By class, without the URL: it may hold credentials."""
    cause = getattr(error, "os_error", None) or error
    number = getattr(cause, "errno", None)
    kind = type(error).__name__
    if number in _OURS:
        raise error
    if isinstance(cause, PrivateAddress) or (number == errno.EACCES and "public address" in str(cause)):
        return FetchError("private_address", host)
    if isinstance(error, aiohttp.ClientConnectorDNSError) or isinstance(cause, socket.gaierror):
        return FetchError("dns", f"{host}: no address", retry=number == socket.EAI_AGAIN)
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)):
        return FetchError("timeout", f"{host}: {kind}", retry=True)
    if isinstance(error, aiohttp.ClientSSLError):
        return FetchError("tls", f"{host}: {kind}")
    if isinstance(error, (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError, ValueError)):
        return FetchError("bad_url", kind)
    if number == errno.ECONNREFUSED:
        return FetchError("refused", host, retry=True)
    if isinstance(error, (aiohttp.ClientError, OSError)):
        return FetchError("network", f"{host}: {kind}", retry=True)
    raise error


def _retry_after(value: str | None) -> float | None:
    """Seconds, of a header that has seconds or a date."""
    if not value:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
