"""What fails costs itself and no more; and how much a stage may do without."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import data.ingest.from_tars as from_tars
import data.ingest.from_urls as from_urls
import data.stages.samples as samples_module
from data.faces.stage import Faces
from data.ingest import ranges
from data.ingest.from_urls import UrlOptions
from data.ingest.stage import IngestStage
from data.stages import failures
from data.stages.failed import give_up_failed, retry_failed
from data.stages.receipts import GIVEN_UP, done_receipts, part_receipts
from data.stages.runner import Part, Pass, Stage, Work, Worker
from data.stages.samples import Shard, open_samples
from data.stages.store import SUMMARY, StageStore
from data.storage import AccessDenied, StorageError
from data.verify_stage import verify_stage
from tests.counting_stage import CountingStage, published
from tests.small_stages import EXPECTED, PART, faces, image, ingest, raw, stored, write_tar
from trainer.errors import UserError


@pytest.fixture
def one_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many tars or shards one item, in parts of three."""
    monkeypatch.setattr("data.ingest.from_tars.PART_SAMPLES", PART)
    monkeypatch.setattr("data.ingest.stage.TAR_ITEMS", 1)
    monkeypatch.setattr(samples_module, "ITEMS", 1)


def finish_without(stage: Stage, store: StageStore, pass_name: str) -> dict[str, int]:
    """The pass's counts once what failed is given up."""
    assert give_up_failed(store, stage)
    assert Worker(stage, store).run() == []
    assert verify_stage(store.url).failures == []
    return dict(store.read_json(SUMMARY)["counts"][pass_name])


# ------------------------------------------------------------------------------------------------- pieces of an item


def test_a_shard_that_storage_does_not_give_costs_its_item_that_shard(
    one_item: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ingest(tmp_path / "in", raw(tmp_path / "raw"))
    shards = open_samples(source).shards()
    stuck = shards[1]
    blur_shard = Faces._of_shard

    def fails(self: Faces, shard: Shard, work: Work) -> Any:
        if shard.name == stuck.name:
            raise StorageError("not read within 300 s")
        return blur_shard(self, shard, work)

    monkeypatch.setattr(Faces, "_of_shard", fails)
    stage, store = faces(source), StageStore(str(tmp_path / "out"))
    (failure,) = Worker(stage, store).run()
    assert "not read within 300 s" in failure
    counts = finish_without(stage, store, "faces")
    assert counts["kept"] + stuck.counts["kept"] == len(EXPECTED)
    assert {name: n for name, n in counts.items() if "given_up" in name} == {
        GIVEN_UP: 1, "given_up/shards": 1, "given_up/samples": stuck.counts["kept"],
    }  # fmt: skip
    assert len(stored(store.url, tmp_path)) == counts["kept"]


def test_where_nothing_answers_not_every_piece_is_waited_for(
    one_item: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = [str(write_tar(tmp_path / f"raw/{n}.tar", [image(n)])) for n in range(6)]
    stage = IngestStage([str(tmp_path / "raw")])
    tried: list[str] = []

    def fails(url: str, **options: Any) -> Any:
        tried.append(url)
        raise StorageError("no answer")

    monkeypatch.setattr(from_tars, "RangeReader", fails)
    Worker(stage, StageStore(str(tmp_path / "out")), attempts=1).run()
    assert tried == tars[:3]


def test_a_tar_that_storage_does_not_give_costs_its_item_that_tar(
    one_item: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tars of as many samples as parts have, also, which have no more to say at their end."""
    tars = [str(write_tar(tmp_path / f"raw/{n}.tar", [image(3 * n + i) for i in range(3)])) for n in range(3)]

    class Reader(ranges.RangeReader):
        def read(self, offset: int, count: int) -> bytes:
            if self.url == tars[1]:
                raise StorageError("not read within 300 s")
            return super().read(offset, count)

    monkeypatch.setattr(from_tars, "RangeReader", Reader)
    stage, store = IngestStage([str(tmp_path / "raw")]), StageStore(str(tmp_path / "out"))
    assert len(Worker(stage, store).run()) == 1
    assert finish_without(stage, store, "ingest") == {"read": 6, "kept": 6, GIVEN_UP: 1, "given_up/tars": 1}


@pytest.mark.parametrize("why", ["gone", "denied"])
def test_what_is_missing_from_a_tar_is_counted_once_its_stats_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr("data.ingest.from_tars.PART_SAMPLES", PART)
    tar = write_tar(tmp_path / "raw/a.tar", [image(n) for n in range(5)])
    stats = tar.with_name("a_stats.json")
    stats.write_text(json.dumps({"successes": 7}))
    stage, store = IngestStage([str(tmp_path / "raw")]), StageStore(str(tmp_path / "out"))
    read = from_tars.read_object

    def fails(fs: Any, path: str, max_bytes: int) -> bytes:
        if why == "denied":
            raise AccessDenied("a_stats.json: access denied; check the permissions")
        stats.unlink(missing_ok=True)
        return read(fs, path, max_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(from_tars, "read_object", fails)
        (failure,) = Worker(stage, store, attempts=1).run()
    assert "a_stats.json: " in failure
    assert len(store.names("work/ingest/parts/0000000-a")) == 2, "what was read is kept"
    stats.write_text(json.dumps({"successes": 7}))
    retry_failed(store, stage)
    assert Worker(stage, store).run() == []
    (receipt,) = done_receipts(store, "ingest")
    assert receipt["counts"] == {"read": 7, "kept": 5, "rejected/missing_from_tar": 2}


def listed_images(folder: Path, number: int) -> IngestStage:
    folder.mkdir()
    for n in range(number):
        (folder / f"{n}.png").write_bytes(image(n))
    rows = [json.dumps({"url": f"{n}.png", "caption": f"number {n}"}) for n in range(number)]
    (folder / "list.jsonl").write_text("\n".join(rows))
    return IngestStage([str(folder / "list.jsonl")], urls=UrlOptions(allow_local=True))


def stick(monkeypatch: pytest.MonkeyPatch, names: set[str]) -> None:
    read = from_urls.read_image_file

    def fails(fs: Any, path: str, max_bytes: int) -> bytes:
        if Path(path).name in names:
            raise StorageError("not read within 300 s")
        return read(fs, path, max_bytes)

    monkeypatch.setattr(from_urls, "read_image_file", fails)
    monkeypatch.setattr(from_urls, "PART_SAMPLES", PART)


def test_an_object_that_storage_does_not_give_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stick(monkeypatch, {"4.png"})
    store = StageStore(str(tmp_path / "out"))
    assert Worker(listed_images(tmp_path / "list", 8), store).run() == []
    assert store.read_json(SUMMARY)["counts"]["ingest"] == {"read": 8, "kept": 7, "rejected/storage_failed": 1}


def test_of_more_such_objects_it_is_storage_that_fails_and_other_rows_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stick(monkeypatch, {"3.png", "5.png"})
    monkeypatch.setattr(from_urls, "STUCK_OBJECTS", 1)
    stage, store = listed_images(tmp_path / "list", 8), StageStore(str(tmp_path / "out"))
    (failure,) = Worker(stage, store).run()
    assert "not read within 300 s" in failure
    assert finish_without(stage, store, "ingest") == {"read": 5, "kept": 5, GIVEN_UP: 1, "given_up/samples": 3}


# ------------------------------------------------------------------------------------------------------------ how much


class Sparing(CountingStage):
    bad: Sequence[str] = ()

    def passes(self) -> Sequence[Pass]:
        count, total = super().passes()
        return [Pass("count", count.items, self._some, spares=True), total]

    def _some(self, work: Work) -> Iterator[Part]:
        if work.item["name"] in self.bad:
            raise UserError(f"s3://b/{work.item['name']}: access denied")
        return super()._count(work)


def sparing(items: int, bad: int) -> Sparing:
    stage = Sparing(items=items)
    stage.bad = [f"i{n:03d}" for n in range(bad)]
    return stage


def test_only_a_small_share_is_given_up_unasked(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    Worker(sparing(8, 4), store).run()
    with pytest.raises(UserError, match=r"count: 4 of 8 items have failed, and --give-up-failed does without 3 at most; the "
                       r"commonest reason, of 4 of 4: s3://b/i000: access denied; .* add --give-up-at-most 4"):  # fmt: skip
        give_up_failed(store, sparing(8, 4))
    assert len(store.names("work/count/done")) == 4
    assert len(give_up_failed(store, sparing(8, 4), at_most=4)) == 4


def test_what_was_given_up_before_is_of_the_share(tmp_path: Path) -> None:
    """Else asking again and again would give up all."""
    store = StageStore(str(tmp_path))
    Worker(sparing(8, 2), store, attempts=3).run()
    assert len(give_up_failed(store, sparing(8, 2))) == 2
    for name in ("i006", "i007"):
        store.delete(f"work/count/done/{name}.json")
        failures.record(store, "work/count", name, "x", "me", "lost", times=3)
    with pytest.raises(UserError, match=r"2 of 8 items have failed, 2 were given up before, .* --give-up-at-most 4"):
        give_up_failed(store, sparing(8, 2))


def test_not_all_is_given_up_unasked(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    Worker(sparing(2, 2), store).run()
    with pytest.raises(UserError, match="2 of 2 items have failed, and --give-up-failed does without 1 at most"):
        give_up_failed(store, sparing(2, 2))
    assert len(give_up_failed(store, sparing(2, 2), at_most=2)) == 2


def test_denied_access_is_tried_again(tmp_path: Path) -> None:
    class Mended(Sparing):
        def _some(self, work: Work) -> Iterator[Part]:
            if len(work.store.names("work/count/failed")) < 2:
                raise AccessDenied("s3://b/x: access denied")
            return super()._some(work)

    assert Worker(Mended(items=1), StageStore(str(tmp_path))).run() == []


# ------------------------------------------------------------------------------------------------------------ way back


def test_what_was_given_up_is_tried_again_until_the_next_pass_has_begun(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    assert len(Worker(sparing(6, 1), store).run()) == 1
    assert len(give_up_failed(store, sparing(6, 1))) == 1
    store.create_json("work/sum/items.json", [{"name": "all"}])
    assert retry_failed(store, sparing(6, 1)) == 0
    store.delete("work/sum/items.json")
    assert retry_failed(store, sparing(6, 1)) == 1
    assert Worker(sparing(6, 0), store).run() == []
    assert len(published(store)) == 60
    assert store.read_json(SUMMARY)["counts"]["count"] == {"read": 60, "kept": 60}


def test_of_a_finished_stage_nothing_is_taken_up_again(tmp_path: Path) -> None:
    store = StageStore(str(tmp_path))
    Worker(sparing(6, 1), store).run()
    give_up_failed(store, sparing(6, 1))
    Worker(sparing(6, 1), store).run()
    assert retry_failed(store, sparing(6, 1)) == 0
    assert store.read_json(SUMMARY)["counts"]["count"][GIVEN_UP] == 1


@pytest.mark.parametrize("when", ["data.stages.failures.reason", "data.stages.failed.part_receipts"])
def test_an_item_that_was_done_meanwhile_is_not_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Before we have its lease, or in spite of it."""
    store = StageStore(str(tmp_path))
    Worker(sparing(6, 1), store).run()
    plain = failures.reason if when.endswith("reason") else part_receipts

    def slow(*args: Any) -> Any:
        store.create_json("work/count/done/i000.json", {"by": "another"})
        return plain(*args)

    monkeypatch.setattr(when, slow)
    assert give_up_failed(store, sparing(6, 1)) == []
    assert store.read_json("work/count/done/i000.json") == {"by": "another"}
