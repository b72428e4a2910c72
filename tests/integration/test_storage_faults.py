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
from data.deadlines import call_within
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


BUSY_S = (0.6, 6.0, 60.0)
"""Deadlines one after another: on a busy machine a request of the client's may not even have been sent within a third of the
first."""
PATIENCE_S = 60.0


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Within `PATIENCE_S`, an attempt that hangs is left behind after 0.6 s: a busy machine may need more than three."""
    monkeypatch.setattr(storage_module, "ATTEMPTS_AT_HANGING", 100)


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
    for deadline_s in BUSY_S:
        fault.happened, began = 0, time.monotonic()
        told = rf"^s3://[^\n]*: not \w+ within {deadline_s:.0f} s \(TimeoutError: no answer in time\)$"
        with pytest.raises(StorageError, match=told):
            call(store, tmp_path / "file", deadline_s)
        assert time.monotonic() - began < deadline_s + 50
        if fault.happened >= 2:
            break
    # Asked again, too.
    assert fault.happened >= 2


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("kind", ["list", "create", "put", "delete"])
def test_what_hangs_once_is_survived(server: Proxy, store: StageStore, tmp_path: Path, kind: str) -> None:
    fault, call = hanging(store, tmp_path / "file", kind, 1)
    server.faults.append(fault)
    expected = {"list": ["file"], "create": True}
    assert call(store, tmp_path / "file", PATIENCE_S) == expected.get(kind)
    if kind == "put":
        assert store.read("new", max_bytes=100) == b"a file"
    if kind == "delete":
        assert not store.exists("there/file")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def let_go(server: Proxy) -> None:
    server.released.set()
    server.released.clear()


def test_a_create_that_lands_late_replaces_nothing(
    server: Proxy, store: StageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patience:
        patience.setattr(storage_module, "ATTEMPTS_AT_HANGING", 100)
        server.faults.append(Fault("held", part="new", methods=("PUT",), times=1))
        assert store.create("new", b"ours", deadline_s=PATIENCE_S)  # by its second attempt
    before = server.answered
    let_go(server)
    wait_for(lambda: server.answered > before)
    assert store.read("new", max_bytes=100) == b"ours"
    assert not store.create("new", b"theirs")

    before = server.answered
    fault = Fault("held", part="given-up", methods=("PUT",))
    server.faults.append(fault)
    attempts: list[str] = []

    def counted(function: Callable[[], object], deadline: float, what: str, stall_s: float) -> object:
        attempts.append(what)
        return call_within(function, deadline, what, stall_s)

    with monkeypatch.context() as counting:
        counting.setattr(storage_module, "call_within", counted)
        with pytest.raises(StorageError):
            store.create("given-up", b"ours", deadline_s=0.6)
    wait_for(lambda: fault.happened == len(attempts))
    fault.times = fault.happened
    assert server.answered == before
    assert store.create("given-up", b"theirs")
    let_go(server)
    wait_for(lambda: server.answered >= before + 1 + len(attempts))
    assert store.read("given-up", max_bytes=100) == b"theirs"


@pytest.mark.usefixtures("patient")
def test_a_create_knows_its_own_that_landed_late(server: Proxy, store: StageStore) -> None:
    """The first attempt is left behind and lands before the second, whose refusal is then no other writer's doing."""
    server.faults += [
        Fault("late", part="new", methods=("PUT",), times=1, amount=0.8),
        Fault("late", part="new", methods=("PUT",), times=1, amount=0.4),
    ]
    assert store.create("new", b"ours", deadline_s=PATIENCE_S)
    assert store.read("new", max_bytes=100) == b"ours"


def test_a_large_file_has_the_time_that_it_needs(
    server: Proxy, store: StageStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "MIN_BYTES_PER_S", 10_000)
    file = tmp_path / "file"
    fault = Fault("late", part="new", methods=("PUT",), amount=1.0)
    server.faults.append(fault)
    file.write_bytes(bytes(300_000))
    store.put_new(file, "new", deadline_s=0.6)
    assert fault.happened == 1
    server.faults[:] = [Fault("held", part="new", methods=("PUT",))]
    file.write_bytes(bytes(1_000))
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
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    listed, written, end = done.stdout.splitlines()
    assert "not listed within 1 s" in listed
    assert "not written within 1 s" in written
    assert time.time() - float(end) < 60
