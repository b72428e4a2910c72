"""How a stage ends: finished by one worker, or without items that failed for good; and races between workers."""

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from data.stages import leases, runner, status
from data.stages.failed import give_up_failed, retry_failed
from data.stages.once import OnceReadStore
from data.stages.receipts import GIVEN_UP, MENDING, READERS, done_receipts, part_receipts
from data.stages.runner import FINISH, Pass, Worker
from data.stages.status import Watcher
from data.stages.store import SUMMARY, Json, StageStore
from data.storage import Storage
from data.verify_stage import verify_stage
from tests.counting_stage import CountingStage, expected, published
from trainer.errors import UserError


class Finishing(CountingStage):
    """Says how often it was finished."""

    finished: list[str]
    dies = False
    seconds_of_finish = 0.0

    def finish(self, store: StageStore) -> dict[str, Json]:
        self.finished.append(threading.current_thread().name)
        if self.dies:
            raise _Dies
        time.sleep(self.seconds_of_finish)
        return {"total": sum(len(receipt["parts"]) for receipt in done_receipts(store, "count"))}


class _Dies(BaseException):
    pass


def finishing(log: list[str], *, dies: bool = False, seconds: float = 0.0, items: int = 3) -> Finishing:
    stage = Finishing(items=items)
    stage.finished, stage.dies, stage.seconds_of_finish = log, dies, seconds
    return stage


def at_once(workers: Sequence[Callable[[], object]]) -> None:
    threads = [threading.Thread(target=work) for work in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


# --------------------------------------------------------------------------------------------------------------- finish


def test_of_workers_that_end_at_once_one_finishes_and_all_see_it_done(tmp_path: Path) -> None:
    log: list[str] = []
    results: list[list[str]] = []
    url = str(tmp_path / "out")

    def work() -> None:
        results.append(Worker(finishing(log, seconds=0.5), StageStore(url), lease_s=30.0).run())
        assert StageStore(url).exists(SUMMARY), "ended before the stage was finished"

    at_once([work] * 3)
    assert results == [[], [], []]
    assert len(log) == 1
    summary = StageStore(url).read_json(SUMMARY)
    assert (summary["total"], summary["counts"]["count"]) == (9, {"read": 30, "kept": 30})
    assert not StageStore(url).names(FINISH)


def test_where_the_worker_that_finishes_dies_another_takes_over(tmp_path: Path) -> None:
    log: list[str] = []
    store = StageStore(str(tmp_path / "out"))
    with pytest.raises(_Dies):
        Worker(finishing(log, dies=True), store).run()
    assert not store.exists(SUMMARY)
    held_until = time.time() + 1.0
    # A worker that vanishes releases nothing.
    store.create_json(f"{FINISH}/finish.0000", {"worker": "gone", "attempt": "x", "deadline": held_until})
    assert Worker(finishing(log), store, lease_s=1.0).run() == []
    assert time.time() >= held_until
    assert len(log) == 2
    assert store.exists(SUMMARY)


def test_finishing_that_kills_its_workers_is_told(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path / "out"))
    dead = {"worker": "gone", "attempt": "x", "deadline": 0, "deaths": leases.MAX_DEATHS - 1}
    store.create_json(f"{FINISH}/finish.0003", dead)
    with pytest.raises(UserError, match="20 workers died one after another while they finished"):
        Worker(CountingStage(), store).run()
    assert Worker(CountingStage(), store).run() == []


def test_receipts_are_read_once_to_finish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Worker(CountingStage(items=6), StageStore(str(tmp_path))).run()
    read: list[str] = []
    plain = Storage.read

    def counted(storage: Storage, name: str, **options: Any) -> bytes:
        read.append(name)
        return plain(storage, name, **options)

    monkeypatch.setattr(Storage, "read", counted)
    with OnceReadStore(str(tmp_path)) as store:
        first = list(done_receipts(store, "count"))
        assert list(done_receipts(store, "count")) == first
    assert sorted(read) == [f"work/count/done/i{i:03d}.json" for i in range(6)]
    assert first == list(done_receipts(StageStore(str(tmp_path)), "count"))


# -------------------------------------------------------------------------------------------------------------- give up


class Sparing(CountingStage):
    def passes(self) -> Sequence[Pass]:
        return [Pass("count", *self._of(0), spares=True), Pass("sum", *self._of(1))]

    def _of(self, number: int) -> tuple[Any, Any]:
        one = super().passes()[number]
        return one.items, one.parts


def test_what_failed_for_good_is_given_up_with_the_parts_it_has_and_never_silently(tmp_path: Path) -> None:
    """An item that fails at its second part."""

    class Half(Sparing):
        def _count(self, work: runner.Work) -> Iterator[runner.Part]:
            for part in super()._count(work):
                yield part
                if work.item["name"] == "i001":
                    raise UserError("bytes 100 to 200 are lost")

    store = StageStore(str(tmp_path))
    assert Worker(Half(items=3), store).run() == ["count i001: bytes 100 to 200 are lost"]
    (one,) = give_up_failed(store, Half(items=3))
    assert (one.pass_name, one.item, one.why, one.parts) == ("count", "i001", "bytes 100 to 200 are lost", 1)
    assert give_up_failed(store, Half(items=3)) == []
    assert Watcher(str(tmp_path)).poll().passes[0].given_up == {"i001": "bytes 100 to 200 are lost"}
    assert Worker(Half(items=3), store).run() == []
    assert published(store) == [
        line for line in expected(Half(items=3)) if line not in {f"i001/{n}" for n in range(4, 10)}
    ]
    summary = store.read_json(SUMMARY)
    assert summary["counts"]["count"] == {"read": 24, "kept": 24, GIVEN_UP: 1}
    assert summary["given_up"] == {"count": {"i001": "bytes 100 to 200 are lost"}}
    status = Watcher(str(tmp_path)).poll()
    assert status.finished
    assert status.passes[0].given_up == {"i001": "bytes 100 to 200 are lost"}
    assert verify_stage(str(tmp_path)).failures == []


def test_only_what_has_failed_for_good_is_given_up(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    Worker(Sparing(items=2, fails="i001"), store).run()
    store.delete(f"work/count/failed/{store.names('work/count/failed')[0]}")
    assert give_up_failed(store, Sparing(items=2)) == []
    assert Worker(Sparing(items=2), store).run() == []


def test_what_others_need_is_not_given_up(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    stage = CountingStage(items=2, fails="i001", fails_for_user=True)
    Worker(stage, store).run()
    with pytest.raises(UserError, match=r"count i001: cannot be given up, what follows needs it \(bad item\)"):
        give_up_failed(store, stage)
    assert not store.exists("work/count/done/i001.json")


def test_an_item_that_a_worker_holds_is_not_given_up(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    stage = Sparing(items=2, fails="i001", fails_for_user=True)
    Worker(stage, store).run()
    lease = {"worker": "busy", "attempt": "x", "deadline": time.time() + 60}
    store.create_json("work/count/leases/i001.0000", lease)
    with pytest.raises(UserError, match="count i001: a worker is at it"):
        give_up_failed(store, stage)


# ---------------------------------------------------------------------------------------------------------------- races


def taken(
    store: StageStore, generation: int | None = None, *, seconds: float = 60.0, attempt: str = "a"
) -> leases.Lease:
    lease = leases.take(
        store, "work/x/leases", "i", generation, worker="me", attempt=attempt, seconds=seconds, parts=lambda: 0
    )
    assert lease
    return lease


def test_a_lease_that_was_released_between_the_listing_and_reading_it_is_left_to_the_next_listing(
    tmp_path: Path,
) -> None:
    """Else two would hold the item: who lists now begins with generation 0, and sees no higher one but the next."""
    store = StageStore(str(tmp_path))
    assert leases.take(store, "work/x/leases", "i", 2, worker="me", attempt="a", seconds=60, parts=lambda: 0) is None
    assert not store.names("work/x/leases")


def test_who_slept_through_takeover_and_release_takes_the_item_from_nobody(tmp_path: Path) -> None:
    """The lease of generation 0 is another's by now, though of the same name."""
    store = StageStore(str(tmp_path))
    with taken(store, seconds=0.3) as sleeper:
        store.delete(sleeper.name)
        theirs = taken(store, attempt="b")
        assert sleeper.lost.wait(60)
    found = leases.holder(store, "work/x/leases", "i", 0)
    assert found is not None
    assert found.attempt == "b", "neither renewed nor released by who had it before"
    with theirs:
        pass
    assert not store.names("work/x/leases")


def test_a_release_spares_the_lease_of_whoever_came_after(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    with taken(store) as sleeper:
        store.delete(sleeper.name)
        taken(store, attempt="b")
    assert store.names("work/x/leases") == ["i.0000"]


def test_parts_are_read_up_to_the_first_that_has_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mending forgets the last first; names may be listed before, and read after."""
    Worker(CountingStage(items=1, samples=12), StageStore(str(tmp_path))).run()
    store = StageStore(str(tmp_path))
    receipts = part_receipts(store, "count", "i000")
    assert [receipt["part"] for receipt in receipts] == [0, 1, 2]
    names = store.names("work/count/parts/i000")
    (tmp_path / "work/count/parts/i000" / names[1]).unlink()
    assert part_receipts(store, "count", "i000") == receipts[:1]
    monkeypatch.setattr(store, "names", lambda _: names)
    assert part_receipts(store, "count", "i000") == receipts[:1]


def test_receipts_that_go_while_they_are_read_are_told(tmp_path: Path) -> None:
    Worker(CountingStage(items=5 * READERS, samples=1), StageStore(str(tmp_path))).run()
    receipts = done_receipts(StageStore(str(tmp_path)), "count")
    next(receipts)
    (tmp_path / f"work/count/done/i{5 * READERS - 1:03d}.json").unlink()
    with pytest.raises(UserError, match=r"i0\d9.json: has gone while the receipts were read"):
        list(receipts)


def test_a_listing_while_files_come_and_go(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    store.create("x/stays", b"")
    ended = threading.Event()

    def come_and_go() -> None:
        while not ended.is_set():
            name = f"x/{threading.get_ident()}.0000"
            store.create(name, os.urandom(4))
            store.delete(name)

    threads = [threading.Thread(target=come_and_go) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            assert "stays" in store.names("x")
            assert all("." in name or name == "stays" for name in store.names("x"))
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_nobody_works_where_a_stage_is_being_mended(tmp_path: Path) -> None:
    """Also a worker that was there before: it sees it once it has taken an item."""
    store = StageStore(str(tmp_path))

    class Late(CountingStage):
        def open(self) -> None:
            store.create_json(MENDING, {})

    with pytest.raises(UserError, match=r"run `loupe data verify .* --quarantine` to its end"):
        Worker(Late(), store).run()
    assert not store.names("work/count/done")
    assert not store.names("work/count/leases")
    with pytest.raises(UserError, match="damaged files are being taken out"):
        Worker(CountingStage(), store).run()


# --------------------------------------------------------------------------------------------------------------- status


class _SlowReads:
    """Storage whose reads of receipts take their time, and are counted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.names: list[str] = []
        plain = Storage.read

        def read(storage: Storage, name: str, **options: Any) -> bytes:
            if "/done/" in name:
                self.names.append(name)
                time.sleep(seconds)
            return plain(storage, name, **options)

        monkeypatch.setattr(Storage, "read", read)


def test_a_look_is_short_however_many_receipts_there_are_and_the_next_ones_catch_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """60 receipts of 0.16 s: 10 s one by one. The names tell at once how many items are done."""
    store = StageStore(str(tmp_path))
    stage = CountingStage(items=61, samples=1, fails="i060")
    Worker(stage, store).run()
    reads = _SlowReads(monkeypatch, 0.16)
    watcher, looks = Watcher(str(tmp_path)), []
    for _ in range(200):
        began = time.monotonic()
        count = watcher.poll(within_s=0.3).passes[0]
        looks.append((count.done, count.counted, time.monotonic() - began))
        assert count.counts["read"] == count.counted
        if count.counted == count.done:
            break
    assert all(done == 60 for done, _, _ in looks)
    assert min(seconds for _, _, seconds in looks) < 5, "of one on which the machine did not stall"
    assert len(looks) > 2
    assert 0 < looks[0][1] < 60
    assert len(reads.names) == len(set(reads.names)) == 60, "each is read once"


def test_a_finished_stage_is_told_by_its_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Worker(CountingStage(items=6), StageStore(str(tmp_path))).run()
    reads = _SlowReads(monkeypatch, 0.0)
    count = Watcher(str(tmp_path)).poll().passes[0]
    assert (count.items, count.done, count.counted, count.counts) == (6, 6, 6, {"read": 60, "kept": 60})
    assert not reads.names


def looked_until(watcher: Watcher, *, done: int) -> status.PassStatus:
    """Names are listed again after ten times what listing them took."""
    end = time.monotonic() + 60
    while (one := watcher.poll().passes[0]).done != done:
        assert time.monotonic() < end, one
        time.sleep(0.02)
    return one


def test_a_watcher_sees_what_mending_takes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "LOCAL_LISTING_S", 0.0)
    store = StageStore(str(tmp_path))
    Worker(CountingStage(items=4, fails="i003"), store).run()
    watcher = Watcher(str(tmp_path))
    assert watcher.poll().passes[0].counts["read"] == 30
    store.delete("work/count/done/i001.json")
    one = looked_until(watcher, done=2)
    assert (one.done, one.counted, one.counts["read"]) == (2, 2, 20)
    retry_failed(store, CountingStage(items=4))
    Worker(CountingStage(items=4), store).run()
    assert watcher.poll().finished
    store.delete(SUMMARY)
    store.delete("work/count/done/i002.json")
    one = looked_until(watcher, done=3)
    assert (one.done, one.counted, one.counts["read"]) == (3, 3, 30)


def test_names_are_listed_as_seldom_as_it_is_dear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Worker(CountingStage(items=3, fails="i001"), StageStore(str(tmp_path))).run()
    listed: list[float] = []
    plain = Storage.names

    def names(storage: Storage, folder: str = "", **options: Any) -> list[str]:
        if folder.endswith("/done"):
            listed.append(time.monotonic())
            time.sleep(0.1)
        return plain(storage, folder, **options)

    monkeypatch.setattr(Storage, "names", names)
    monkeypatch.setattr(status, "LOCAL_LISTING_S", 0.0)
    watcher = Watcher(str(tmp_path))
    while len(listed) < 2:
        watcher.poll()
        time.sleep(0.05)
    assert listed[1] - listed[0] >= 1.0, "0.1 s each, so once in 1 s"
