"""What hangs is left behind at its deadline, on local paths too; what it does later changes nothing."""

import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest

from data.deadlines import Call, call_within
from data.publish import put_whole
from data.stages.store import StageStore
from data.storage import DamagedShard, Storage, StorageError, ask, check_size_of
from tests.skipping_clock import SkippingClock
from trainer.errors import UserError


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage._FIRST_PAUSE_S", 0.01)


@pytest.fixture
def patient(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that hangs is left behind after half a second, and there are a hundred of them: a busy machine needs more
    than three."""
    monkeypatch.setattr("data.storage.ATTEMPTS_AT_HANGING", 100)


PATIENCE_S = 50.0
"""Deadline of `patient` calls."""


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Set in the end: no thread of a test outlives it."""
    event = threading.Event()
    yield event
    event.set()


def test_a_call_gives_what_the_function_gives() -> None:
    assert call_within(lambda: 7, time.monotonic() + 60, "seven") == 7
    with pytest.raises(ValueError, match="seven"):
        call_within(lambda: int("seven"), time.monotonic() + 60, "seven")
    calls = [Call(partial(pow, i, 2), "square") for i in range(20)]
    assert [call.wait(time.monotonic() + 60) for call in calls] == [i * i for i in range(20)]


@pytest.mark.parametrize(("deadline_s", "stall_s"), [(0.2, 50.0), (50.0, 0.2), (-1.0, 50.0)])
def test_a_call_that_hangs_is_left_behind(released: threading.Event, deadline_s: float, stall_s: float) -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer in time"):
        call_within(lambda: released.wait(60), time.monotonic() + deadline_s, "hangs", stall_s)
    assert time.monotonic() - began < 45


def test_storage_that_hangs_is_asked_three_times(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of the test's own."""
    now = [100.0]
    waits: list[float] = []

    def pass_by(seconds: float) -> None:
        now[0] += seconds

    def hangs(function: object, deadline: float, what: str, stall_s: float) -> None:
        waits.append(min(stall_s, deadline - now[0]))
        pass_by(waits[-1])
        raise TimeoutError("no answer in time")

    monkeypatch.setattr("data.storage.time", SimpleNamespace(monotonic=lambda: now[0], sleep=pass_by))
    monkeypatch.setattr("data.storage.call_within", hangs)
    with pytest.raises(StorageError, match=r"^x: not listed within 1 s \(TimeoutError: no answer in time\)$"):
        ask(lambda: None, "x", deadline_s=0.9, verb="listed")
    assert waits == pytest.approx([0.3, 0.3, 0.3], abs=0.05), "pauses are of the same time"
    assert now[0] == pytest.approx(100.9)


def test_what_hangs_once_is_survived(patient: None, released: threading.Event) -> None:
    asked: list[int] = []

    def hangs_first() -> str:
        asked.append(len(asked))
        if asked == [0]:
            released.wait(60)
        return "here"

    assert ask(hangs_first, "x", deadline_s=PATIENCE_S) == "here"


def test_many_bytes_have_more_time(quick: None, released: threading.Event) -> None:
    """An attempt has a second for each megabyte, or a third of the deadline where that is more."""
    with pytest.raises(StorageError):
        ask(lambda: released.wait(60), "x", deadline_s=0.6, num_bytes=100_000)
    ask(lambda: time.sleep(0.5), "x", deadline_s=0.6, num_bytes=60_000_000)


# ------------------------------------------------------------------------------------------------------------ local paths


@pytest.fixture
def pipes(tmp_path: Path) -> Iterator[Path]:
    """A folder of files that hang who opens them, as on a network mount whose server is gone."""
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("read", "put", "create"):
        os.mkfifo(folder / name)
    yield folder
    for path in folder.iterdir():  # who still waits goes on
        os.close(os.open(path, os.O_RDWR | os.O_NONBLOCK))


def test_local_files_that_hang(quick: None, pipes: Path, tmp_path: Path) -> None:
    storage, store = Storage(str(pipes)), StageStore(str(pipes))
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"read: not read within .*no answer in time"):
        storage.read("read", max_bytes=100, deadline_s=0.3)
    with pytest.raises(StorageError, match="put: not written within"):
        store.put_new(file, "put", deadline_s=0.3)
    # It asks whether what is there is its own.
    with pytest.raises(StorageError, match="create: not written within"):
        store.create("create", b"x", deadline_s=0.3)
    assert time.monotonic() - began < 100


def test_a_mount_that_hangs_at_the_end_of_a_copy(
    patient: None, released: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.publish.DEADLINE_S", PATIENCE_S)
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    flush = os.fsync
    hung: list[int] = []

    def hangs_first(descriptor: int) -> None:
        if not hung:
            hung.append(descriptor)
            released.wait(60)
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", hangs_first)
    storage = Storage(str(tmp_path / "out"))
    put_whole(storage, file, "shard")
    assert (tmp_path / "out" / "shard").read_bytes() == b"x" * 100
    file.write_bytes(b"y" * 50)
    released.set()
    wait_for(lambda: storage.names(hidden=True) == ["shard"])
    assert (tmp_path / "out" / "shard").read_bytes() == b"x" * 100


def wait_for(condition: object) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------ what lands after all


def test_an_upload_left_behind_sends_what_it_was_given(
    patient: None, released: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though another file has come to the name of its own meanwhile, as parts of an item do."""
    memory = type(fsspec.filesystem("memory"))
    put, calls = memory.put_file, []

    def hangs_first(self: object, source: str, target: str, **options: object) -> None:
        calls.append(source)
        if len(calls) == 1:
            released.wait(60)
        put(self, source, target, **options)
        calls.append("landed")

    monkeypatch.setattr(memory, "put_file", hangs_first)
    storage = Storage("memory://uploads")
    file = tmp_path / "samples.tar"
    file.write_bytes(b"first")
    storage.put(file, "part0", deadline_s=PATIENCE_S)
    file.unlink()
    file.write_bytes(b"the second")
    storage.put(file, "part1")
    released.set()
    wait_for(lambda: len(calls) == 2 * calls.count("landed"))
    assert len(calls) >= 6
    assert storage.read("part0", max_bytes=100) == b"first"
    assert storage.read("part1", max_bytes=100) == b"the second"
    wait_for(lambda: os.listdir(tmp_path) == ["samples.tar"])


def test_an_upload_needs_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuses)
    (tmp_path / "file").write_bytes(b"content")
    Storage("memory://unlinked").put(tmp_path / "file", "file")
    assert Storage("memory://unlinked").read("file", max_bytes=100) == b"content"
    assert os.listdir(tmp_path) == ["file"]


# ------------------------------------------------------------------------------------------------------------------ rest


@pytest.mark.parametrize("url", ["local", "memory://basics"])
def test_names_exists_delete(url: str, tmp_path: Path) -> None:
    store = StageStore(str(tmp_path / "new") if url == "local" else url)
    assert store.names() == store.names("work") == []
    assert not store.exists("work/a.json")
    store.delete("work/a.json")
    assert store.create("work/a.json", b"1")
    store.replace("work/.hidden", b"2")
    assert store.names("work") == ["a.json"]
    assert store.names("work", hidden=True) == [".hidden", "a.json"]
    assert store.names() == ["work"]
    assert store.exists("work/a.json")
    assert store.exists("work")
    assert not store.exists("work/a.json/below")
    store.delete("work/a.json")
    assert not store.exists("work/a.json")
    assert store.names("work") == []


def test_exists_does_not_take_failure_for_no(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.storage.time", SkippingClock())
    memory = type(fsspec.filesystem("memory"))

    def fails(self: object, path: str, **options: object) -> None:
        raise OSError("down")

    monkeypatch.setattr(memory, "info", fails)
    with pytest.raises(StorageError, match=r"not found within .*down"):
        Storage("memory://basics").exists("x", deadline_s=60.0)


@pytest.mark.parametrize("url", ["local", "memory://large"])
def test_the_mend_fits_what_is_read(url: str, tmp_path: Path) -> None:
    url = str(tmp_path) if url == "local" else url
    StageStore(url).replace("file", b"x" * 100)
    with pytest.raises(UserError, match=r"larger than the 10 bytes it may have; .*build the dataset again$"):
        Storage(url).read("file", max_bytes=10)
    with pytest.raises(UserError, match=r"larger than the 10 bytes it may have; .*run the stage again$"):
        StageStore(url).read("file", max_bytes=10)
    with pytest.raises(DamagedShard, match=r"has 100 bytes, its receipt says 200; .*run the stage again$"):
        list(StageStore(url).ranges("file", 200, time.monotonic() + 60))
    with pytest.raises(DamagedShard, match=r"has 1 bytes, the index says 2; .*build the dataset again$"):
        check_size_of(2, 1, "x")
