"""Damage of a stage's output: found, taken out, and made anew by running the stage again; killed at any step of it."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from data import mend_stage, storage
from data.mend_stage import mend
from data.stages.receipts import MENDING, done_receipts
from data.stages.runner import FINISH, Worker
from data.stages.store import STAGE, SUMMARY, StageStore
from data.stages.upkeep import remove_tree
from data.storage import Storage
from data.verify_stage import verify_stage
from tests.counting_stage import CountingStage, expected, published, worked_at
from trainer.errors import UserError

STAGE_OF = CountingStage(items=4, samples=12)
"""Three parts an item."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "out"
    Worker(STAGE_OF, StageStore(str(folder))).run()
    return folder


@pytest.fixture
def store(finished: Path, tmp_path: Path) -> StageStore:
    return StageStore(shutil.copytree(finished, str(tmp_path / "out")))


def file_of(store: StageStore, item: str, part: int, pass_name: str = "count") -> Path:
    receipt = store.read_json(f"work/{pass_name}/done/{item}.json")
    (file,) = receipt["parts"][part]["files"].values()
    return Path(store.path(file["name"]))


def tree(store: StageStore) -> dict[str, bytes]:
    root = Path(store.root)
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def check_whole(store: StageStore) -> None:
    assert published(store) == expected(STAGE_OF)
    report = verify_stage(store.url)
    assert report.failures == []
    assert report.finished
    assert store.read_json(SUMMARY)["counts"]["count"] == {"read": 48, "kept": 48}


def test_what_is_forgotten_begins_with_the_first_damaged_part(store: StageStore, tmp_path: Path) -> None:
    before = tree(store)
    damaged = [file_of(store, "i001", 1), file_of(store, "i003", 2)]
    damaged[0].write_bytes(b"bad")
    damaged[1].unlink()
    report = verify_stage(store.url)
    assert len(report.failures) == 2
    said: list[str] = []
    done = mend(store.url, report, tell=said.append)
    assert said == ["to be deleted and made anew, since it follows count: sum, 1 items with 1 files of 0.0 MB"]
    assert done is not None
    assert done.files == [f"quarantine/{damaged[0].relative_to(store.root)}"], "the other was missing"
    assert done.items == {"count": ["i001", "i003"]}
    assert (done.parts, done.passes) == (3, ["sum"])
    assert not store.exists(SUMMARY)
    assert not store.exists(MENDING)
    assert not store.names("work/sum")
    (kept,) = (path for path in (tmp_path / "out/quarantine").rglob("*") if path.is_file())
    assert kept.read_bytes() == b"bad"
    log = tmp_path / "log"
    Worker(CountingStage(items=4, samples=12, log=str(log)), store).run()
    assert worked_at(log) == [*(f"i001/{n}" for n in range(4, 12)), *(f"i003/{n}" for n in range(8, 12))] or worked_at(
        log
    ) == [*(f"i003/{n}" for n in range(8, 12)), *(f"i001/{n}" for n in range(4, 12))]
    check_whole(store)
    same = [
        name for name in before if name.startswith(("files/count/i000", "files/count/i002", "work/count/done/i000"))
    ]
    assert len(same) == 7
    assert all(tree(store)[name] == before[name] for name in same)


@pytest.mark.parametrize(
    "damage", ["json", "counts", "foreign name", "gone", "part", "summary", "counts of the summary"]
)
def test_receipts_that_are_damaged_or_gone_are_mended_too(store: StageStore, damage: str) -> None:
    done = Path(store.path("work/count/done/i002.json"))
    if damage == "json":
        done.write_text("{")
    elif damage == "counts":
        done.write_text(json.dumps({**json.loads(done.read_text()), "counts": {"read": 13}}))
    elif damage == "foreign name":
        done.write_text(done.read_text().replace("files/count/i002/000001", "files/../../x/000001"))
    elif damage == "gone":
        done.unlink()
    elif damage == "part":
        done.unlink()
        Path(store.path("work/count/parts/i002/000001.json")).write_text("{}")
    elif damage == "summary":
        Path(store.path(SUMMARY)).write_text("{}")
    else:
        Path(store.path(SUMMARY)).write_text(json.dumps({"stage": "counting", "counts": {"count": {"read": 1}}}))
    report = verify_stage(store.url)
    assert report.failures
    made = mend(store.url, report)
    assert made is not None
    assert made.items == ({} if "summary" in damage else {"count": ["i002"]})
    assert made.parts == {"foreign name": 2, "part": 2}.get(damage, 0)
    assert not made.files
    Worker(STAGE_OF, store).run()
    check_whole(store)


def test_a_part_that_is_not_what_the_items_receipt_says_is_made_anew(store: StageStore) -> None:
    """Of an item whose last file is damaged, the first part's own receipt, which nobody has looked at since."""
    Path(store.path("work/count/parts/i000/000000.json")).write_text("{")
    file_of(store, "i000", 2).unlink()
    made = mend(store.url, verify_stage(store.url))
    assert made is not None
    assert made.parts == 3
    Worker(STAGE_OF, store).run()
    check_whole(store)


def test_parts_of_an_item_in_work_are_looked_at(tmp_path: Path) -> None:
    """Else its next worker would go on behind what is damaged."""
    store = StageStore(str(tmp_path))
    Worker(CountingStage(items=2, samples=12, fails="i001"), store).run()
    path = file_of(store, "i000", 0)
    store.delete("work/count/done/i000.json")
    path.write_bytes(b"bad")
    report = verify_stage(store.url)
    assert [(one.item, one.part) for one in report.damaged] == [("i000", 0)]
    made = mend(store.url, report)
    assert made is not None
    assert made.parts == 3


class _Killed(BaseException):
    pass


def test_killed_at_any_step_it_is_not_finished_and_the_next_goes_on(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the first change, behind each of them, and in between."""
    steps = 0
    while True:
        store = StageStore(shutil.copytree(finished, str(tmp_path / str(steps))))
        file_of(store, "i001", 1).write_bytes(b"bad")
        file_of(store, "all", 0, "sum").write_bytes(b"bad, too")
        report = verify_stage(store.url)
        killed = _kill_at(steps, store, monkeypatch, report)
        if not killed:
            break
        # The lease, the summary's end, and what is written down: from then on nobody works before it is done.
        assert store.exists(SUMMARY) == (steps < 2), "looks whole, and is being mended"
        assert store.exists(MENDING) == (steps > 2)
        if store.exists(MENDING):
            with pytest.raises(UserError, match="or that was stopped in the midst"):
                Worker(STAGE_OF, store).run()
            assert any("was stopped in the midst" in line for line in verify_stage(store.url).failures)
            mend(store.url)
        again = verify_stage(store.url)
        if again.failures:
            mend(store.url, again)
        Worker(STAGE_OF, store).run()
        check_whole(store)
        steps += 1
    assert steps > 8


def _kill_at(step: int, store: StageStore, monkeypatch: pytest.MonkeyPatch, report: Any) -> bool:
    """Mend until the change of that number, before it and without a trace of an end; whether there was one."""
    count = 0
    with monkeypatch.context() as patch:
        for name in ("create", "replace", "ask"):
            plain = getattr(StageStore, name)

            def change(self: Storage, *a: Any, plain: Any = plain, name: str = name, **k: Any) -> Any:
                nonlocal count
                if name != "ask" or a[3] in ("moved", "deleted"):
                    count += 1
                    if count > step:
                        raise _Killed
                return plain(self, *a, **k)

            patch.setattr(StageStore, name, change)
        patch.setattr("data.stages.leases.Lease.__exit__", lambda self, *_: self._end.set())
        try:
            mend(store.url, report)
        except _Killed:
            for lease in store.names("work/mending/leases"):  # as when it has expired
                Path(store.path(f"work/mending/leases/{lease}")).unlink()
            return True
    return False


@pytest.mark.parametrize("where", ["work/count/leases/i001.0000", f"{FINISH}/finish.0002"])
def test_refused_while_workers_are_there(store: StageStore, where: str) -> None:
    file_of(store, "i001", 1).unlink()
    report = verify_stage(store.url)
    store.create_json(where, {"worker": "busy", "attempt": "x", "deadline": time.time() + 60})
    before = tree(store)
    with pytest.raises(UserError, match="busy works there; stop the workers"):
        mend(store.url, report)
    assert tree(store) == before


def test_refused_while_somebody_else_mends(store: StageStore) -> None:
    store.create_json(
        "work/mending/leases/mending.0000", {"worker": "busy", "attempt": "x", "deadline": time.time() + 60}
    )
    with pytest.raises(UserError, match="somebody else takes damaged files out of it"):
        mend(store.url, verify_stage(store.url))


@pytest.mark.parametrize(
    "plan",
    [
        {"pass": "count", "items": {"../../x": 0}, "passes": [], "files": []},
        {"pass": "count", "items": {}, "passes": ["../.."], "files": []},
        {"pass": "count", "items": {}, "passes": [], "files": ["files/../../x"]},
        {"pass": "count", "items": {"i000": -1}, "passes": [], "files": []},
        [],
    ],
)
def test_what_was_written_down_is_not_believed(store: StageStore, plan: Any, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    store.create_json(MENDING, plan)
    with pytest.raises(UserError, match=r"not ours or damaged|nothing there is to be trusted"):
        mend(store.url)
    assert (tmp_path / "x").exists()


def test_a_pass_whose_name_leads_elsewhere_is_refused(store: StageStore, tmp_path: Path) -> None:
    stage = store.read_json(STAGE)
    store.replace(STAGE, json.dumps({**stage, "passes": ["count", "../../elsewhere"]}).encode())
    (tmp_path / "elsewhere").mkdir()
    file_of(store, "i001", 1).unlink()
    report = verify_stage(store.url)
    with pytest.raises(UserError, match="is no name of a pass"):
        mend(store.url, report)
    assert (tmp_path / "elsewhere").exists()


def test_items_that_cannot_be_mended_are_told(store: StageStore) -> None:
    Path(store.path("work/count/items.json")).write_text("[{}]")
    report = verify_stage(store.url)
    assert report.lasting == report.failures
    assert "items.json: is damaged; run the stage anew, into another folder" in report.failures[0]
    assert len(list(done_receipts(store, "count"))) == 4


@pytest.mark.parametrize("what", ["files", "bytes"])
def test_much_that_follows_is_deleted_only_if_that_is_meant(
    store: StageStore, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(mend_stage, "REMAKE_FILES" if what == "files" else "REMAKE_BYTES", 0)
    file_of(store, "i001", 1).write_bytes(b"bad")
    before = tree(store)
    report = verify_stage(store.url)
    with pytest.raises(UserError, match=r"sum, 1 items with 1 files of 0.0 MB; add --remake-later-passes"):
        mend(store.url, report)
    assert tree(store) == before
    done = mend(store.url, report, remake_later=True)
    assert done is not None
    assert done.passes == ["sum"]
    Worker(STAGE_OF, store).run()
    check_whole(store)


@pytest.mark.parametrize("name", ["files", "files/count", "files/count/i000", "files/count/i001/../x", "FILE"])
def test_a_receipt_that_names_a_folder_or_anothers_file_moves_nothing(store: StageStore, name: str) -> None:
    whole = file_of(store, "i000", 1)
    bad = name.replace("FILE", str(whole.relative_to(store.root)))
    done = Path(store.path("work/count/done/i001.json"))
    receipt = json.loads(done.read_text())
    receipt["parts"][1]["files"]["numbers"]["name"] = bad
    done.write_text(json.dumps(receipt))
    report = verify_stage(store.url)
    assert [(one.item, one.part) for one in report.damaged] == [("i001", 1)]
    assert "is no name of a file of i001" in report.failures[0]
    mended = mend(store.url, report)
    assert mended is not None
    assert mended.files == []
    assert whole.exists()
    Worker(STAGE_OF, store).run()
    check_whole(store)


def test_a_tree_is_removed_while_another_removes_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attempt that hung and was left behind: what was listed has gone when it is this one's turn."""
    monkeypatch.setattr(storage, "_FIRST_PAUSE_S", 0.02)
    store = StageStore(str(tmp_path))
    for i in range(20):
        for j in range(5):
            store.create(f"files/count/i{i:03d}/{j}", b"x")
    plain = os.unlink
    beside = 0

    def unlink(path: Any, **options: Any) -> None:
        nonlocal beside
        beside += 1
        plain(path, **options)
        if beside % 3 == 1:
            raise FileNotFoundError(path)

    monkeypatch.setattr(os, "unlink", unlink)
    remove_tree(store, "files/count")
    assert beside == 100
    assert not store.exists("files/count")
    remove_tree(store, "files/count")
