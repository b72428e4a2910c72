"""The stage runner: parts, leases, takeover, failures, and that every sample is published exactly once."""

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from data.stages import leases, runner
from data.stages.failed import retry_failed
from data.stages.receipts import done_receipts, hash_file
from data.stages.runner import Part, Stopped, Work, Worker
from data.stages.samples import fetch
from data.stages.status import Watcher
from data.stages.store import SUMMARY, StageStore, check_claim, claim
from tests.counting_stage import CountingStage, expected, published, worked_at
from trainer.errors import UserError


def worker(stage: CountingStage, url: object, **options: float) -> Worker:
    return Worker(stage, StageStore(str(url)), **options)  # type: ignore[arg-type]


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.glob("files/**/*") if path.is_file()}


def test_every_sample_once_with_receipts_that_fit_the_files(tmp_path: Path) -> None:
    stage = CountingStage(items=5, samples=10, part=4)
    assert worker(stage, tmp_path / "out").run() == []
    store = StageStore(str(tmp_path / "out"))
    assert published(store) == expected(stage)
    named = set()
    for receipt in [*done_receipts(store, "count"), *done_receipts(store, "sum")]:
        for part in receipt["parts"]:
            for file in part["files"].values():
                path = tmp_path / "out" / file["name"]
                assert (path.stat().st_size, hash_file(path)) == (file["bytes"], file["xxh64"])
                named.add(file["name"])
    assert named == files(tmp_path / "out")
    assert [len(r["parts"]) for r in done_receipts(store, "count")] == [3] * 5
    summary = store.read_json(SUMMARY)
    assert summary["counts"]["count"] == {"read": 50, "kept": 50}
    assert not store.names("work/count/leases")
    (total,) = done_receipts(store, "sum")
    assert json.loads((tmp_path / "out" / total["parts"][0]["files"]["sum"]["name"]).read_text()) == 50


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stage = CountingStage(log=str(log))
    worker(stage, tmp_path / "out").run()
    before = log.read_text()
    worker(stage, tmp_path / "out").run()
    assert log.read_text() == before


def test_other_settings_or_another_stage_are_refused(tmp_path: Path) -> None:
    worker(CountingStage(), tmp_path / "out").run()
    with pytest.raises(UserError, match=r"begun with samples = 10, now it is 11; repeat the first command"):
        worker(CountingStage(samples=11), tmp_path / "out").run()

    class Other(CountingStage):
        name = "other"

    with pytest.raises(UserError, match="is the output of `counting`, not of `other`"):
        worker(Other(), tmp_path / "out").run()


def test_the_setting_that_differs_is_named_however_deep(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    claim(store, "x", 1, {"filters": {"min_side": 64, "max_aspect": 3}}, ["x"])
    with pytest.raises(UserError, match=r"begun with filters.min_side = 64, now it is 32; "):
        check_claim(store, "x", 1, {"filters": {"min_side": 32, "max_aspect": 3}})


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        worker(CountingStage(), tmp_path).run()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


class _Dies(BaseException):
    pass


def test_what_a_dead_worker_published_is_kept_and_at_most_a_part_is_done_again(tmp_path: Path) -> None:
    """A worker that vanishes in the midst of an item's third part; its lease stays behind."""
    log = tmp_path / "log"
    stage = CountingStage(items=1, samples=20, part=4, log=str(log))

    class Mortal(CountingStage):
        def _count(self, work: Work) -> Iterator[Part]:
            for number, part in enumerate(super()._count(work)):
                if number == 2:
                    raise _Dies
                yield part

    with pytest.raises(_Dies):
        worker(Mortal(items=1, samples=20, part=4, log=str(log)), tmp_path / "out").run()
    StageStore(str(tmp_path / "out")).create_json(
        "work/count/leases/i000.0000", {"worker": "gone", "attempt": "x", "deadline": 0}
    )
    worker(stage, tmp_path / "out").run()
    assert published(StageStore(str(tmp_path / "out"))) == expected(stage)
    again = [n for n, times in Counter(worked_at(log)).items() if times > 1]
    assert again == [f"i000/{n}" for n in range(8, 12)]


def test_a_lease_that_is_held_is_respected_and_taken_over_when_it_ends(tmp_path: Path) -> None:
    stage = CountingStage(items=1)
    out = StageStore(str(tmp_path / "out"))
    worker(CountingStage(items=1), tmp_path / "other").run()
    held_until = time.time() + 1.5
    out.create_json("work/count/leases/i000.0000", {"worker": "else", "attempt": "x", "deadline": held_until})
    worker(stage, tmp_path / "out", lease_s=1.0).run()
    assert time.time() >= held_until
    assert published(out) == expected(stage)
    assert not out.names("work/count/leases")


def test_a_worker_that_slept_through_its_lease_publishes_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    """The sleeper has computed a part; another has taken over, and ended, before it goes on."""
    taken, go_on = threading.Event(), threading.Event()

    class Sleeper(CountingStage):
        def _count(self, work: Work) -> Iterator[Part]:
            for part in super()._count(work):
                taken.set()
                assert go_on.wait(300)
                yield part

    sleeper = worker(Sleeper(items=1), tmp_path / "out")
    thread = threading.Thread(target=sleeper.run)
    thread.start()
    assert taken.wait(300)
    out = StageStore(str(tmp_path / "out"))
    out.create_json("work/count/leases/i000.0001", {"worker": "late", "attempt": "y", "deadline": 0})
    worker(CountingStage(items=1), tmp_path / "out").run()
    before = files(tmp_path / "out")
    go_on.set()
    thread.join(300)
    assert not thread.is_alive()
    assert files(tmp_path / "out") == before
    assert published(out) == expected(CountingStage(items=1))


def test_files_of_a_worker_that_died_before_its_receipt_are_swept(tmp_path: Path) -> None:
    orphan = tmp_path / "out/files/count/i000/0000-dead.txt"
    StageStore(str(tmp_path / "out"))
    worker(CountingStage(items=1, fails="i000"), tmp_path / "out").run()
    orphan.parent.mkdir(parents=True)
    orphan.touch()
    stage = CountingStage(items=1)
    retry_failed(StageStore(str(tmp_path / "out")), stage)
    worker(stage, tmp_path / "out").run()
    assert len(files(tmp_path / "out")) == 4  # three parts and the sum
    assert not orphan.exists()


def test_renewal_keeps_a_lease_that_is_shorter_than_the_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stage = CountingStage(items=1, samples=8, part=8, seconds=0.8, log=str(log))
    threads = [threading.Thread(target=worker(stage, tmp_path / "out", lease_s=5.0).run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(worked_at(log)) == 8
    assert published(StageStore(str(tmp_path / "out"))) == expected(stage)


def test_what_fails_is_tried_three_times_and_told_while_the_rest_is_done(tmp_path: Path) -> None:
    stage = CountingStage(items=3, fails="i001")
    assert worker(stage, tmp_path / "out").run() == ["count i001: broken item"]
    out = StageStore(str(tmp_path / "out"))
    assert len(out.names("work/count/failed")) == 3
    assert "RuntimeError" in out.read_json(f"work/count/failed/{out.names('work/count/failed')[0]}")["trace"]
    assert not out.exists(SUMMARY)
    assert {line.split("/")[0] for line in published(out)} == {"i000", "i002"}
    mended = CountingStage(items=3)
    assert worker(mended, tmp_path / "out").run() == ["count i001: broken item"]
    assert retry_failed(out, mended) == 1
    assert worker(mended, tmp_path / "out").run() == []
    assert published(out) == expected(mended)


def test_a_users_error_is_not_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stage = CountingStage(items=1, fails="i000", fails_for_user=True, log=str(log))
    assert worker(stage, tmp_path / "out").run() == ["count i000: bad item"]


def test_an_item_that_kills_its_workers_is_given_up_and_tried_again_when_asked(tmp_path: Path) -> None:
    out = StageStore(str(tmp_path / "out"))
    dead = {"worker": "gone", "attempt": "x", "deadline": 0, "deaths": leases.MAX_DEATHS - 1}
    out.create_json(f"work/count/leases/{leases.lease_name('i000', 3)}", dead)
    stage = CountingStage(items=1)
    (line,) = worker(stage, tmp_path / "out").run()
    assert "20 workers died at it" in line
    assert retry_failed(out, stage) == 1
    assert worker(stage, tmp_path / "out").run() == []


def test_deaths_count_only_since_the_last_part(tmp_path: Path) -> None:
    out = StageStore(str(tmp_path / "out"))
    dead = {"worker": "gone", "attempt": "x", "deadline": 0, "deaths": leases.MAX_DEATHS - 1, "parts": 0}
    out.create_json(f"work/count/leases/{leases.lease_name('i000', 0)}", dead)
    taken = leases.take(out, "work/count/leases", "i000", 0, worker="me", attempt="a", seconds=60, parts=lambda: 1)
    assert taken
    assert (taken.deaths, taken.parts, taken.generation) == (0, 1, 1)


def test_a_machine_that_cannot_open_the_stage_fails_none_of_its_items(tmp_path: Path) -> None:
    class Needy(CountingStage):
        def open(self) -> None:
            raise UserError("no weights here")

    with pytest.raises(UserError, match="no weights here"):
        worker(Needy(items=2), tmp_path / "out").run()
    assert worker(CountingStage(items=2), tmp_path / "out").run() == []


def test_stopped_between_samples(tmp_path: Path) -> None:
    stage = CountingStage(items=1, samples=1000, part=10, seconds=0.005)
    one, out = worker(stage, tmp_path / "out"), StageStore(str(tmp_path / "out"))

    def stop_after_a_part() -> None:
        while not out.names("work/count/parts/i000"):
            time.sleep(0.01)
        one.stop.set()

    threading.Thread(target=stop_after_a_part).start()
    with pytest.raises(Stopped):
        one.run()
    assert 0 < len(out.names("work/count/parts/i000")) < 100
    assert not out.names("work/count/leases"), "given back, so that nobody waits for it"


# -------------------------------------------------------------------------------------------------------------- storage


@pytest.mark.parametrize("where", ["local", "memory"])
def test_of_two_writers_one_makes_an_object(where: str, tmp_path: Path) -> None:
    store = StageStore(str(tmp_path) if where == "local" else f"memory://{tmp_path.name}-{time.time_ns()}")
    assert store.create("a/b", b"one")
    assert not store.create("a/b", b"two")
    assert store.create("a/b", b"one"), "an answer that was lost and is asked for again"
    assert store.read("a/b", max_bytes=10) == b"one"
    assert store.names("a") == ["b"]


def test_many_threads_and_one_winner(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    won: list[int] = []
    ready = threading.Barrier(16)

    def go(i: int) -> None:
        ready.wait()
        if store.create("x", str(i).encode()):
            won.append(i)

    threads = [threading.Thread(target=go, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "x").read_text() == str(won[0])


def test_storage_that_overwrites_where_it_should_refuse_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(
        type(memory), "pipe_file", lambda self, path, value, mode="overwrite", **_: self.open(path, "wb").write(value)
    )
    with pytest.raises(UserError, match="overwrites where it should refuse"):
        worker(CountingStage(), f"memory://loose-{time.time_ns()}").run()


# --------------------------------------------------------------------------------------------------------------- status


def test_status_tells_what_is_done_failed_and_in_work(tmp_path: Path) -> None:
    stage = CountingStage(items=4, fails="i002")
    worker(stage, tmp_path / "out").run()
    out = StageStore(str(tmp_path / "out"))
    out.create_json(
        "work/count/leases/i002.0000", {"worker": "busy", "attempt": "x", "deadline": time.time() + 60, "samples": 7}
    )
    status = Watcher(out.url).poll()
    count, total = status.passes
    assert (status.stage, status.finished) == ("counting", False)
    assert (count.items, count.done, count.in_work) == (4, 3, 7)
    assert count.failed == {"i002": "broken item"}
    assert count.counts == {"read": 30, "kept": 30}
    assert [(item, holder.worker) for item, holder in count.holders] == [("i002", "busy")]
    assert total.items is None


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "files/../../secret",
        "/etc/hostname",
        "files/ingest/../secret",
        "files",
        "files/ingest",
        "files/ingest/i000",
        "files/ingest/i000/",
        "files//i000/x",
        7,
    ],
)
def test_a_receipt_that_leads_out_of_the_folder_is_refused(name: object, tmp_path: Path) -> None:
    file = {"name": name, "bytes": 1, "xxh64": "0" * 16}
    with pytest.raises(UserError, match="is no name of a stage's file"):
        fetch(StageStore(str(tmp_path)), file, tmp_path / "x", 100)


def test_a_file_that_changed_since_its_receipt_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "files/ingest/i000/a"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"abc")
    file = {"name": "files/ingest/i000/a", "bytes": 3, "xxh64": hash_file(path)}
    assert fetch(StageStore(str(tmp_path)), file, tmp_path / "x", 100).read_bytes() == b"abc"
    path.write_bytes(b"abd")
    with pytest.raises(UserError, match="is not what its receipt says"):
        fetch(StageStore(str(tmp_path)), file, tmp_path / "x", 100)


def test_parts_hold_no_more_than_a_killed_worker_may_lose() -> None:
    assert runner.PART_SAMPLES == 1000
