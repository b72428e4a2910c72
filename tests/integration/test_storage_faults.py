"""Storage that hangs, at each kind of request: an error by the deadline, and nothing wrong by what happens later all the same.

The client is the real one, the server speaks S3, and a proxy between them holds requests back.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import storage as storage_module
from data.stages.store import StageStore
from data.storage import StorageError
from tests.faulty_proxy import Fault, Proxy
from tests.s3_server import BUCKET, faulty_s3

ROOT = Path(__file__).parents[2]
ALL = ("GET", "PUT", "POST", "DELETE", "HEAD")


@pytest.fixture(scope="module")
def server() -> Iterator[Proxy]:
    with faulty_s3() as proxy:
        yield proxy


@pytest.fixture
def store(server: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StageStore]:
    monkeypatch.setattr(storage_module, "_FIRST_PAUSE_S", 0.02)
    store = StageStore(f"s3://{BUCKET}/{tmp_path.name}")
    store.replace("there/file", b"content")
    yield store
    server.faults.clear()
    server.released.set()  # held requests end, so that their connections are free again
    server.released.clear()


Calling = Callable[[StageStore, Path, float], object]
HANGING: dict[str, tuple[str, str, Calling]] = {
    "list": ("GET", "list-type=2", lambda store, _, s: store.names("there", deadline_s=s)),
    "head": ("HEAD", "there/file", lambda store, _, s: store.exists("there/file", deadline_s=s)),
    "create": ("PUT", "new", lambda store, _, s: store.create("new", b"ours", deadline_s=s)),
    "replace": ("PUT", "there/file", lambda store, _, s: store.replace("there/file", b"new", deadline_s=s)),
    "put": ("PUT", "new", lambda store, file, s: store.put_new(file, "new", deadline_s=s)),
    "size after put": ("HEAD", "new", lambda store, file, s: store.put(file, "new", deadline_s=s)),
    "delete": ("DELETE", "there/file", lambda store, _, s: store.delete("there/file", deadline_s=s)),
    "read": ("GET", "there/file", lambda store, _, s: store.read("there/file", max_bytes=100, deadline_s=s)),
}


def hanging(store: StageStore, file: Path, kind: str, times: int) -> tuple[Fault, Calling]:
    """A fault, and a call that meets it; `file` is there to be sent."""
    method, part, call = HANGING[kind]
    file.write_bytes(b"a file")
    # Not what earlier tests have left behind.
    part = part if "=" in part else f"{store.url.rpartition('/')[2]}/{part}"
    return Fault("hang", part=part, methods=(method,), times=times), call


@pytest.mark.parametrize("kind", HANGING)
def test_what_hangs_for_good_is_an_error_by_its_deadline(
    server: Proxy, store: StageStore, tmp_path: Path, kind: str
) -> None:
    fault, call = hanging(store, tmp_path / "file", kind, 1000)
    server.faults.append(fault)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"^s3://[^\n]*: not \w+ within 1 s \(TimeoutError: no answer in time\)$"):
        call(store, tmp_path / "file", 0.6)
    assert time.monotonic() - began < 5
    # Asked again, too.
    assert fault.happened >= 2


@pytest.mark.parametrize("kind", ["list", "create", "put", "delete"])
def test_what_hangs_once_is_survived(server: Proxy, store: StageStore, tmp_path: Path, kind: str) -> None:
    fault, call = hanging(store, tmp_path / "file", kind, 1)
    server.faults.append(fault)
    expected = {"list": ["file"], "create": True}
    assert call(store, tmp_path / "file", 1.8) == expected.get(kind)
    if kind == "put":
        assert store.read("new", max_bytes=100) == b"a file"
    if kind == "delete":
        assert not store.exists("there/file")


def landed(server: Proxy, count: int) -> None:
    """Wait until so many requests have been answered by the server itself."""
    deadline = time.monotonic() + 10
    while server.answered < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_create_that_lands_late_replaces_nothing(server: Proxy, store: StageStore) -> None:
    before = server.answered
    server.faults.append(Fault("late", part="new", methods=("PUT",), times=1, amount=1.0))
    assert store.create("new", b"ours", deadline_s=1.5)  # by its second attempt
    landed(server, before + 2)
    assert store.read("new", max_bytes=100) == b"ours"
    assert not store.create("new", b"theirs")

    before = server.answered
    fault = Fault("late", part="given-up", methods=("PUT",), amount=2.5)
    server.faults.append(fault)
    with pytest.raises(StorageError):
        store.create("given-up", b"ours", deadline_s=0.6)
    fault.times = fault.happened
    assert server.answered == before
    assert store.create("given-up", b"theirs")
    landed(server, before + 1 + fault.happened)
    assert store.read("given-up", max_bytes=100) == b"theirs"


def test_a_create_knows_its_own_that_landed_late(server: Proxy, store: StageStore) -> None:
    """The first attempt is left behind and lands before the second, whose refusal is then no other writer's doing."""
    server.faults += [
        Fault("late", part="new", methods=("PUT",), times=1, amount=1.2),
        Fault("late", part="new", methods=("PUT",), times=1, amount=0.5),
    ]
    assert store.create("new", b"ours", deadline_s=3.0)
    assert store.read("new", max_bytes=100) == b"ours"


def test_a_large_file_has_the_time_that_it_needs(
    server: Proxy, store: StageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "MIN_BYTES_PER_S", 100_000)
    file = tmp_path / "file"
    fault = Fault("late", part="new", methods=("PUT",), amount=1.0)
    server.faults.append(fault)
    file.write_bytes(bytes(300_000))
    store.put_new(file, "new", deadline_s=0.6)
    assert fault.happened == 1
    file.write_bytes(bytes(10_000))
    with pytest.raises(StorageError):
        store.put_new(file, "new", deadline_s=0.6)


def test_what_is_left_behind_holds_up_no_exit(server: Proxy, store: StageStore) -> None:
    server.faults.append(Fault("hang", part=BUCKET, methods=ALL))
    code = f"""
import time
from data.stages.store import StageStore
from data.storage import StorageError
store = StageStore("{store.url}")
for call in (lambda: store.names("there", deadline_s=0.6), lambda: store.create("new", b"x", deadline_s=0.6)):
    try:
        call()
    except StorageError as e:
        print(e, flush=True)
print(time.time())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    listed, written, end = done.stdout.splitlines()
    assert "not listed within 1 s" in listed
    assert "not written within 1 s" in written
    assert time.time() - float(end) < 5
