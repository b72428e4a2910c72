"""An S3 server of our own for tests: moto's, in a process of its own, at a free port, with keys that are none."""

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import s3fs

from tests.distributed.harness import free_port
from tests.faulty_proxy import Proxy, faulty_proxy

BUCKET = "loupe-tests"


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment in which `s3://loupe-tests/...` is this server, for this process and those that it starts."""
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 240
        while not _answers(endpoint):
            assert server.poll() is None, "moto's server ended at once"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.05)
        environment = {
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_ACCESS_KEY_ID": "none",
            "AWS_SECRET_ACCESS_KEY": "none",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        with pytest.MonkeyPatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("AWS_")]:
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            _forget_connections()
            _fs().mkdir(BUCKET)
            yield environment
        _forget_connections()
    finally:
        server.terminate()
        server.wait(timeout=120)


def _answers(endpoint: str) -> bool:
    try:
        with urllib.request.urlopen(f"{endpoint}/moto-api/", timeout=20):
            return True
    except OSError:
        return False


def _fs():  # type: ignore[no-untyped-def]
    import s3fs

    return s3fs.S3FileSystem()


def _forget_connections() -> None:
    """fsspec keeps one object per URL scheme, with the endpoint that it found first."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """URL of an empty bucket; the environment points there while the module's tests run."""
    with s3_server():
        yield f"s3://{BUCKET}"


@contextmanager
def faulty_s3() -> Iterator[Proxy]:
    """A server behind a proxy that spoils answers; the environment's endpoint is the proxy's. Clients try once: their own
    patience is not what is tested."""
    with s3_server() as environment, faulty_proxy(environment["AWS_ENDPOINT_URL"]) as proxy:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
            patch.setenv("AWS_MAX_ATTEMPTS", "1")
            s3fs.S3FileSystem.clear_instance_cache()
            yield proxy
        s3fs.S3FileSystem.clear_instance_cache()
