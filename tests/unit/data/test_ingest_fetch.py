"""Images over HTTP from a real server: what fails, how often it is tried, and where nobody may be led to."""

import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import aiohttp
import pytest

from data.ingest import addresses, fetch
from data.ingest.addresses import PrivateAddress, is_public, public_socket
from data.ingest.fetch import Fetcher, FetchError, FetchLimits
from tests.image_server import ImageServer, image_server
from tests.unit.data.conftest import encoded, picture

IMAGES = {f"{i}.jpg": encoded(picture(i)) for i in range(30)}


@pytest.fixture(scope="module")
def shared_server() -> Iterator[ImageServer]:
    with image_server(IMAGES) as server:
        yield server


@pytest.fixture
def server(shared_server: ImageServer) -> ImageServer:
    shared_server.hits.clear()
    shared_server.most_at_once = shared_server.together = 0
    return shared_server


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def limits(**more: Any) -> FetchLimits:
    return FetchLimits(**{"max_bytes": 1 << 20, "timeout_s": 60.0, "attempts": 2, "allow_private": True, **more})


def get(url: str, folder: Path, **more: Any) -> bytes | FetchError:
    target = folder / "image"
    with Fetcher(limits(**more)) as fetcher:
        try:
            fetcher.submit(url, target).result(300)
        except FetchError as e:
            assert not target.exists()
            return e
    return target.read_bytes()


def test_an_image_as_it_is(server: ImageServer, tmp_path: Path) -> None:
    assert get(server.url("3.jpg"), tmp_path) == IMAGES["3.jpg"]
    assert get(server.url(f"to/{server.url('4.jpg')}"), tmp_path) == IMAGES["4.jpg"]
    assert get(server.url("to//5.jpg"), tmp_path) == IMAGES["5.jpg"]
    assert all("loupe" in agent for agent in server.agents)


@pytest.mark.parametrize(
    ("path", "reason", "requests"),
    [
        ("status/404", "http_4xx", 1),
        ("status/403", "http_4xx", 1),
        ("status/429", "http_4xx", 2),
        ("status/500", "http_5xx", 2),
        ("status/503", "http_5xx", 2),
        ("status/204", "http_2xx", 1),
        ("slow", "timeout", 2),
        ("html", "not_an_image", 1),
        ("gzip/0.jpg", "not_an_image", 1),
        ("cut", "network", 2),
        ("endless", "too_large", 1),
        ("loop", "redirects", 6),
        ("to/ftp://example.org/x.jpg", "bad_url", 1),
        ("to/file:///etc/passwd", "bad_url", 1),
        ("robots/0.jpg", "not_allowed", 1),
    ],
)
def test_failures_by_class(server: ImageServer, tmp_path: Path, path: str, reason: str, requests: int) -> None:
    error = get(server.url(path), tmp_path, timeout_s=1.0 if path == "slow" else 60.0)
    assert isinstance(error, FetchError)
    assert error.reason == reason
    assert server.hits[path] == requests


def test_a_second_try_mends_what_it_can(server: ImageServer, tmp_path: Path) -> None:
    assert get(server.url("once/7.jpg"), tmp_path) == IMAGES["7.jpg"]
    began = time.monotonic()
    assert get(server.url("later"), tmp_path) == IMAGES["0.jpg"]
    assert time.monotonic() - began >= 1.0  # as Retry-After asks
    assert fetch._retry_after("3600") == 3600
    assert (
        3500
        < (fetch._retry_after(time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3600))) or 0)
        < 3700
    )
    assert fetch._retry_after("soon") is None


def test_nobody_there(tmp_path: Path) -> None:
    error = get(f"http://127.0.0.1:{free_port()}/x.jpg", tmp_path)
    assert isinstance(error, FetchError)
    assert error.reason == "refused"
    error = get("http://no-such-host.invalid/x.jpg", tmp_path, allow_private=False)
    assert isinstance(error, FetchError)
    assert error.reason == "dns"


def test_a_host_that_stays_silent_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SILENT_HOST", 3)
    port = free_port()
    with Fetcher(limits(attempts=1, per_host=1)) as fetcher:
        futures = [fetcher.submit(f"http://127.0.0.1:{port}/{i}", tmp_path / f"{i}") for i in range(6)]
        details = [future.exception(300).detail for future in futures]  # type: ignore[union-attr]
    assert sum("in a row" in detail for detail in details) == 3


def test_size_is_bounded_by_the_length_told(server: ImageServer, tmp_path: Path) -> None:
    error = get(server.url("3.jpg"), tmp_path, max_bytes=100)
    assert isinstance(error, FetchError)
    assert error.reason == "too_large"


@pytest.mark.parametrize(("per_host", "connections", "most"), [(2, 64, 2), (30, 3, 3)])
def test_requests_at_once(server: ImageServer, tmp_path: Path, per_host: int, connections: int, most: int) -> None:
    server.together = most
    with Fetcher(limits(per_host=per_host, connections=connections, timeout_s=60)) as fetcher:
        futures = [fetcher.submit(server.url(name), tmp_path / name) for name in IMAGES]
        for future in futures:
            future.result(300)
    assert server.most_at_once == most
    assert all((tmp_path / name).read_bytes() == data for name, data in IMAGES.items())


# ----------------------------------------------------------------------------------------------------- private addresses


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "017700000001", "0.0.0.0", "[::1]", "[::]",
        "[::ffff:127.0.0.1]", "[64:ff9b::7f00:1]", "localhost", "LOCALHOST", "127.0.0.1.", "①②⑦.⓪.⓪.①",
    ],
)  # fmt: skip
def test_this_machine_is_never_asked(server: ImageServer, tmp_path: Path, host: str) -> None:
    error = get(server.url("0.jpg", host), tmp_path, allow_private=False)
    assert isinstance(error, FetchError)
    assert error.reason in ("private_address", "bad_url", "dns")
    assert not server.hits


@pytest.mark.parametrize("host", ["127.0.0.1", "169.254.169.254", "[::1]", "2130706433", "localhost", "10.0.0.1"])
def test_private_addresses_are_called_so(server: ImageServer, tmp_path: Path, host: str) -> None:
    error = get(server.url("latest/meta-data", host), tmp_path, allow_private=False)
    assert isinstance(error, FetchError)
    assert error.reason == "private_address"


@pytest.mark.parametrize(
    "location", ["http://127.0.0.2:{}/1.jpg", "http://[::ffff:127.0.0.2]:{}/1.jpg", "//127.0.0.2:{}/1.jpg"]
)
def test_a_redirect_to_a_private_address(
    server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    """127.0.0.1 plays a public server, which redirects to 127.0.0.2: this machine too, and private."""

    def pretend(address: str) -> bool:
        return address == "127.0.0.1" or is_public(address)

    monkeypatch.setattr(addresses, "is_public", pretend)
    monkeypatch.setattr(fetch, "is_public", pretend)
    assert get(server.url("1.jpg"), tmp_path, allow_private=False) == IMAGES["1.jpg"]
    server.hits.clear()
    path = f"to/{location.format(server.port)}"
    error = get(server.url(path), tmp_path, allow_private=False)
    assert isinstance(error, FetchError)
    assert error.reason == "private_address"
    assert [unquote(hit) for hit in server.hits.elements()] == [path]


def test_a_name_that_turns_private_behind_the_resolver(
    server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resolver says public, then the connection would go elsewhere: the socket is refused."""
    monkeypatch.setattr(fetch, "PublicResolver", aiohttp.ThreadedResolver)
    error = get(server.url("0.jpg", "localhost"), tmp_path, allow_private=False)
    assert isinstance(error, FetchError)
    assert error.reason == "private_address"
    assert not server.hits
    with pytest.raises(PrivateAddress):
        public_socket((socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", 80)))


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700::1111", True), ("1.1.1.1", True),
        ("10.0.0.1", False), ("172.16.0.1", False), ("192.168.1.1", False), ("127.0.0.1", False), ("169.254.169.254", False),
        ("100.64.0.1", False), ("0.0.0.0", False), ("224.0.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False),
        ("198.18.0.1", False), ("192.0.2.1", False), ("::1", False), ("::", False), ("fe80::1", False), ("fe80::1%eth0", False),
        ("fc00::1", False), ("fec0::1", False), ("ff02::1", False), ("2001:db8::1", False), ("::ffff:10.0.0.1", False),
        ("::ffff:8.8.8.8", True), ("::10.0.0.1", False), ("64:ff9b::a00:1", False), ("2002:a00:1::1", False),
        ("2130706433", False), ("localhost", False), ("", False),
    ],
)  # fmt: skip
def test_which_addresses_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public
