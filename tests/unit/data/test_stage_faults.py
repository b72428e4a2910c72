"""A stage whose storage fails: what cannot be read is not taken for damaged, free or done. And mending beside workers."""

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data import storage, verify_stage
from data.commands.progress import StageProgress
from data.mend_stage import mend
from data.stages import leases
from data.stages.receipts import EPOCH, MENDING, check_mending, done_receipts
from data.stages.runner import Stopped, Worker
from data.stages.samples import Samples
from data.stages.store import SUMMARY, StageStore
from data.storage import Storage, StorageError
from tests.counting_stage import CountingStage, expected, published
from tests.skipping_clock import SkippingClock
from trainer.errors import UserError

STAGE_OF = CountingStage(items=4, samples=12)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StageStore:
    monkeypatch.setattr(storage, "time", SkippingClock())
    return StageStore(str(tmp_path / "out"))


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes a file's reads fail, so often."""
    faults: dict[str, list[OSError]] = {}
    plain = storage.LocalFileSystem.open

    def check(path: str) -> None:
        for name, errors in faults.items():
            if path.endswith(name) and errors:
                raise errors.pop()

    def opened(self: Any, path: str, *a: Any, **k: Any) -> Any:
        check(path)
        return plain(self, path, *a, **k)

    def opened_here(path: str, *a: Any, **k: Any) -> Any:
        check(str(path))
        return open(path, *a, **k)

    monkeypatch.setattr(storage, "open", opened_here, raising=False)
    monkeypatch.setattr(storage.LocalFileSystem, "open", opened)

    def fail(name: str, error: OSError, times: int = 1000) -> None:
        faults[name] = [error] * times

    return fail


# --------------------------------------------------------------------------------------------------------------- leases


LEASE = "work/x/leases/i.0000"


def take(store: StageStore, generation: int | None, *, seconds: float = 60.0) -> leases.Lease | None:
    return leases.take(
        store, "work/x/leases", "i", generation, worker="me", attempt="a", seconds=seconds, parts=lambda: 0
    )


def test_a_lease_that_cannot_be_read_now_is_not_free(store: StageStore, unreadable: Callable[..., None]) -> None:
    store.create_json(LEASE, {"worker": "else", "attempt": "x", "deadline": time.time() + 60})
    unreadable(LEASE, OSError(errno.ESTALE, "Stale file handle"), 2)
    assert take(store, 0) is None
    unreadable(LEASE, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(StorageError, match="Input/output error"):
        leases.holder(store, "work/x/leases", "i", 0, deadline_s=60.0)
    unreadable(LEASE, PermissionError(errno.EACCES, "Permission denied"))
    with pytest.raises(UserError, match="access denied"):
        take(store, 0)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"worker": "x"}'])
def test_a_lease_that_is_none_has_expired(store: StageStore, content: bytes) -> None:
    store.create(LEASE, content)
    taken = take(store, 0)
    assert taken is not None
    assert taken.generation == 1


def test_a_release_that_fails_ends_no_worker_and_is_told(
    store: StageStore, unreadable: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    lease = take(store, None, seconds=60.0)
    assert lease
    with lease:
        unreadable(LEASE, OSError(errno.EIO, "Input/output error"))
    assert not lease.lost.is_set()
    assert store.names("work/x/leases") == ["i.0000"]
    assert any("i: not released, so it expires by itself" in message for message in caplog.messages)


def test_a_lease_that_is_lost_says_why_and_all_requests_of_a_renewal_have_one_deadline(
    store: StageStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first takes most of the time, the second hangs for as long as it may."""
    lease = take(store, None, seconds=0.9)
    assert lease
    allowed: list[float] = []

    def slow(*_: Any, deadline_s: float) -> bool:
        time.sleep(0.2)
        return False

    def hang(*_: Any, deadline_s: float, **__: Any) -> bytes:
        allowed.append(deadline_s)
        time.sleep(deadline_s)
        raise StorageError("no answer")

    with lease:
        monkeypatch.setattr(StageStore, "exists", slow)
        monkeypatch.setattr(StageStore, "read", hang)
        assert lease.lost.wait(60)
    assert max(allowed) < 0.15
    assert any("lease of i: lost, not renewed for 1 s: no answer" in message for message in caplog.messages)


def test_being_stopped_is_no_failure_of_storage_that_is_tried_again() -> None:
    """SIGTERM raises it wherever the main thread is, such as in a look at how far the workers are."""

    def stopped() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        storage.ask(stopped, "x", deadline_s=1.0)


def test_progress_that_cannot_be_shown_is_told_once_and_ends_nothing(
    store: StageStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Worker(STAGE_OF, store).run()

    def fail(*_: Any, **__: Any) -> None:
        raise StorageError("storage is away")

    monkeypatch.setattr("data.commands.progress.Watcher.poll", fail)
    with StageProgress(store.url, Console(stderr=True, width=200)) as progress:
        progress.tick()
        progress.tick()
    assert capsys.readouterr().err.count("progress is not known: storage is away") == 1


# --------------------------------------------------------------------------------------------------------------- verify


def name_of(store: StageStore, item: str, part: int) -> str:
    (file,) = store.read_json(f"work/count/done/{item}.json")["parts"][part]["files"].values()
    return str(file["name"])


@pytest.mark.parametrize("kind", ["denied", "fails"])
@pytest.mark.parametrize("what", ["file", "receipt", "summary", "items"])
def test_what_cannot_be_read_is_told_and_is_not_damaged(
    store: StageStore, unreadable: Callable[..., None], monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    monkeypatch.setattr(verify_stage, "FILE_DEADLINE_S", 60.0)
    plain = Storage.read
    Worker(STAGE_OF, store).run()
    monkeypatch.setattr(Storage, "read", lambda *a, max_bytes: plain(*a, max_bytes=max_bytes, deadline_s=60.0))
    error = PermissionError(errno.EACCES, "Permission denied") if kind == "denied" else OSError(errno.EIO, "I/O error")
    places = {"receipt": "work/count/done/i001.json", "summary": SUMMARY, "items": "work/count/items.json"}
    damaged = name_of(store, "i002", 1)
    unreadable(places.get(what) or name_of(store, "i001", 1), error)
    Path(store.path(damaged)).write_bytes(b"bad")
    report = verify_stage.verify_stage(store.url)
    assert [(one.item, one.part) for one in report.damaged] == [("i002", 1)], "and all the rest was looked at"
    assert not report.bad_summary
    assert report.num_files == 13
    (told,) = report.lasting
    assert ("access denied" if kind == "denied" else "I/O error") in told
    assert len(report.failures) == 2


def test_where_storage_is_away_verifying_ends_and_nothing_is_taken_out(
    store: StageStore, unreadable: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_stage, "MAX_UNREAD", 3)
    Worker(STAGE_OF, store).run()
    store.delete("work/count/done/i000.json")
    unreadable(".txt", PermissionError(errno.EACCES, "Permission denied"))
    report = verify_stage.verify_stage(store.url, threads=1)
    assert report.stopped
    assert "3 files could not be read, so the rest was not looked at" in report.lasting[-1]
    with pytest.raises(UserError, match="was not looked at to its end"):
        mend(store.url, report)
    assert store.exists(SUMMARY)


def test_a_shard_is_found_without_its_parts_receipt(store: StageStore) -> None:
    """Which verifying does not look at, since the item's counts."""
    Worker(STAGE_OF, store).run()
    store.fs.rm(store.path("work/count/parts"), recursive=True)
    assert verify_stage.verify_stage(store.url).failures == []
    samples = Samples(store.url, "count")
    receipt = store.read_json("work/count/done/i001.json")["parts"][2]
    receipt["files"] = {"tar": receipt["files"]["numbers"], "index": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.stages.samples._shard", lambda part: part)
        assert samples.shard("i001-0002")["part"] == 2  # type: ignore[index]
    with pytest.raises(UserError, match=r"has no receipt of shard i001-0003; .*--quarantine"):
        samples.shard("i001-0003")
    with pytest.raises(UserError, match=r"done/gone.json: is missing; run `loupe data verify .* --quarantine`"):
        samples.shards_of({"of": "gone", "first": 0, "stop": 1})
    with pytest.raises(UserError, match="is no name of a pass or an item"):
        samples.shards_of({"of": "../../../x"})


# -------------------------------------------------------------------------------------------------------- mend meanwhile


def mend_one(store: StageStore, item: str) -> None:
    """As `loupe data verify --quarantine` does, of an item whose second part is damaged."""
    Path(store.path(name_of(store, item, 1))).write_bytes(b"bad")
    done = mend(store.url, verify_stage.verify_stage(store.url))
    assert done is not None
    assert done.items == {"count": [item]}


@pytest.mark.parametrize("when", ["between items", "between passes", "before the end"])
def test_a_worker_begins_again_where_its_stage_was_mended_meanwhile(
    store: StageStore, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Between leases nobody sees that it is there: it must not go on with what it has listed before."""
    mended: list[str] = []
    plain_take = leases.take

    def take_late(store_: StageStore, folder: str, item: str, *a: Any, **k: Any) -> Any:
        done = store.names("work/count/done")
        due = {
            "between items": folder == "work/count/leases" and len(done) == 2,
            "between passes": item == "items-sum",
            "before the end": item == "finish",
        }
        if due[when] and not mended:
            mended.append(done[0].removesuffix(".json"))
            mend_one(store, mended[0])
        return plain_take(store_, folder, item, *a, **k)

    monkeypatch.setattr(leases, "take", take_late)
    assert Worker(STAGE_OF, store, lease_s=2.0).run() == []
    assert mended
    assert store.exists(EPOCH)
    assert published(store) == expected(STAGE_OF)
    assert store.read_json(SUMMARY)["counts"]["count"] == {"read": 48, "kept": 48}
    (total,) = done_receipts(store, "sum")
    assert store.read(total["parts"][0]["files"]["sum"]["name"], max_bytes=10) == b"48"
    assert verify_stage.verify_stage(store.url).failures == []


def test_no_stage_is_finished_while_an_item_has_no_receipt(store: StageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    plain_take = leases.take

    def take_late(store_: StageStore, folder: str, item: str, *a: Any, **k: Any) -> Any:
        if item == "finish" and not gone:
            gone.append("i001")
            store.delete("work/count/done/i001.json")
        return plain_take(store_, folder, item, *a, **k)

    monkeypatch.setattr(leases, "take", take_late)
    assert Worker(STAGE_OF, store, lease_s=2.0).run() == []
    assert gone
    assert published(store) == expected(STAGE_OF)
    assert store.read_json(SUMMARY)["counts"]["count"] == {"read": 48, "kept": 48}


def test_a_receipt_of_no_item_is_told_and_taken_out(store: StageStore) -> None:
    Worker(CountingStage(items=4, samples=12, fails="i003"), store).run()
    other = {**store.read_json("work/count/done/i001.json"), "item": "stale", "parts": []}
    store.create_json("work/count/done/stale.json", {**other, "counts": {}})
    for file in store.names("work/count/failed"):
        store.delete(f"work/count/failed/{file}")
    with pytest.raises(
        UserError, match="count has a receipt of stale, which is none of its items; run `loupe data verify"
    ):
        Worker(STAGE_OF, store).run()
    report = verify_stage.verify_stage(store.url)
    assert [one.item for one in report.damaged] == ["stale"]
    mend(store.url, report)
    assert Worker(STAGE_OF, store).run() == []
    assert published(store) == expected(STAGE_OF)
    assert verify_stage.verify_stage(store.url).failures == []


def test_of_two_that_have_found_the_same_damage_one_takes_it_out(store: StageStore) -> None:
    Worker(STAGE_OF, store).run()
    Path(store.path(name_of(store, "i001", 1))).write_bytes(b"bad")
    first, second = verify_stage.verify_stage(store.url), verify_stage.verify_stage(store.url)
    mend(store.url, first)
    Worker(STAGE_OF, store).run()
    with pytest.raises(UserError, match="somebody else has taken damage out since it was looked at; verify again"):
        mend(store.url, second)
    whole = verify_stage.verify_stage(store.url)
    assert whole.failures == []
    assert mend(store.url, whole) is None
    assert mend(store.url) is None
    assert store.exists(SUMMARY), "nothing was damaged, so it is whole still"
    assert not store.exists(MENDING)
    check_mending(store)
